"""Bytes and files: checkpoints read lazily and written safely; knows nothing of merging."""
