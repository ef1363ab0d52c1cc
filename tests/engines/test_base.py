"""Engines give the same results in the same order, and of several errors the first item's."""

from __future__ import annotations

import threading
import time

import pytest

from mergewell.engines.base import Engine, Here, Threads

ENGINES = [Here(), Threads(1), Threads(2), Threads(5)]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: f"{type(e).__name__}")
def test_each_gives_the_results_in_the_order_of_the_items(engine: Engine) -> None:
    def slow_if_even(item: int) -> int:
        time.sleep(0.002 * (item % 2 == 0))
        return 10 * item

    assert engine.each(slow_if_even, range(20)) == list(range(0, 200, 10))
    assert engine.each(slow_if_even, iter(range(3))) == [0, 10, 20]
    assert engine.each(slow_if_even, []) == []


def test_workers_share_the_items() -> None:
    both = threading.Barrier(2, timeout=10)

    def meet(item: int) -> int:
        both.wait()  # one worker alone would wait for ever
        return item

    assert Threads(2).each(meet, range(4)) == [0, 1, 2, 3]


def test_the_first_items_error_is_raised_though_a_later_one_was_faster() -> None:
    failed = threading.Event()

    def fail(item: int) -> None:
        if item == 0:
            failed.wait(10)
            raise ValueError("first")
        failed.set()
        raise ValueError("later")

    with pytest.raises(ValueError, match="first"):
        Threads(2).each(fail, range(10))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: f"{type(e).__name__}")
def test_after_an_error_no_further_item_is_begun(engine: Engine) -> None:
    begun: list[int] = []

    def fail_early(item: int) -> None:
        begun.append(item)
        if item == 3:
            raise ValueError("third")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="third"):
        engine.each(fail_early, range(1000))
    assert len(begun) < 50
