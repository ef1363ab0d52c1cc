"""Engines: carry out a function over items, results in order, few enough at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Engine(ABC):
    """Where work is done. The results never depend on the engine, only the time does."""

    @abstractmethod
    def imap(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield `function(item)` for each item, in the order of the items."""


class Here(Engine):
    """In this thread, one after the other; for debugging and as the reference."""

    def imap(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the results in order."""
        return map(function, items)


class Threads(Engine):
    """On a few threads; at most twice as many results wait as there are threads."""

    def __init__(self, workers: int) -> None:
        """Use this many threads."""
        self.workers = workers

    def imap(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the results in order; on an error the rest is cancelled and the error raised."""
        waiting: deque[Future[R]] = deque()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="mergewell") as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) >= 2 * self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def make_engine(workers: int) -> Engine:
    """Return the engine for this many workers; one worker works in the calling thread."""
    return Here() if workers <= 1 else Threads(workers)
