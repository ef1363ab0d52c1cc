"""Giving memory back."""

import ctypes

import pytest

from mergewell.models import heap


def test_free_memory_goes_back_to_the_system() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("not glibc")
    assert heap._trim() is not None
    heap.give_back()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        def __init__(self, _name: object) -> None: ...

    heap._trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", Without)
    heap.give_back()
    heap._trim.cache_clear()
