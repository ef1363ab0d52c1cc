"""Prediction: how much of each expert a merge will keep, learned from thousands of merges."""
