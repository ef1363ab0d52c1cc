"""Companions: small files beside a merged model that give each expert back, one file each."""
