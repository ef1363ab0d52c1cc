"""Heap: memory that is free but that the C library keeps, given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Return free memory to the system where the C library can (glibc's `malloc_trim`).

    A block's weights come and go in pieces of some megabytes, between which small things live on;
    glibc would keep the holes, half a gigabyte and more after some blocks.
    """
    _trim()(0)


@cache
def _trim() -> Callable[[int], object]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or none that can be asked
        return lambda _: None
