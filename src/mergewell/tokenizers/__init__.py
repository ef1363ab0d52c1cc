"""Vocabularies of models: compared, joined, and the rows of embeddings that go with them."""
