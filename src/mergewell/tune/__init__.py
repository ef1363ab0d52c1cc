"""Tuning: method and parameters chosen without labels."""
