"""Descent: coefficients that gradients find, through the same `method.merge` that merges."""
