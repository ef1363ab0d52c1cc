"""Diagnostics: will these models merge? One question a file."""
