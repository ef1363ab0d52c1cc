"""One thing that makes merges garbage a file, found by its name."""
