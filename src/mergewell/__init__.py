"""mergewell: will these models merge, how, what came out, and can the file be trusted."""

__version__ = "0.1.0"
