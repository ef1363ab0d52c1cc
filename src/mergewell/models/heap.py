"""Heap: memory that is free but that the C library keeps, given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

_LARGEST = (32 << 20) - (64 << 10)
"""Bytes, not quite the largest mapping that glibc learns from (DEFAULT_MMAP_THRESHOLD_MAX)."""


def give_back() -> None:
    """Return free memory to the system where the C library can (glibc's `malloc_trim`).

    A block's weights come and go in pieces of some megabytes, between which small things live on;
    glibc would keep the holes, half a gigabyte and more after some blocks.
    """
    _trim()(0)


def settle() -> None:
    """Let glibc keep some tens of megabytes between one use and the next, as it does in the end.

    It doubles what it keeps with the largest mapping that was ever let go of, up to 64 MB. Before
    that it gives the activations of each call back to the system, which clears them anew.
    """
    torch.empty(_LARGEST, dtype=torch.uint8)


@cache
def _trim() -> Callable[[int], object]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or none that can be asked
        return lambda _: None
