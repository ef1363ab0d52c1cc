"""A mixture of experts made of dense models: each gives its own feed-forward layers."""
