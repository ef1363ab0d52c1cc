"""What models do at tasks: labelled data, texts, any Python function, the lm-eval harness."""
