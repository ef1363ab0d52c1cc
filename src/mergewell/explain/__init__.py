"""The three analyses of weight averaging: templates, features against weights, and stability."""
