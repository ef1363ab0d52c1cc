"""Routers made of a merged model and its companion: modules whose weights depend on the input."""
