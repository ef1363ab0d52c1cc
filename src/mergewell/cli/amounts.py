"""Amounts for people, as the command line prints them."""

from __future__ import annotations


def byte_count(count: float) -> str:
    """Return a number of bytes with its unit: 1500 is "1.5 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
