"""Small summaries of weights, activations or gradients that can be made in parts and joined."""
