"""Engines: carry out a function over items, results in order, few enough at a time."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Lock
from typing import TypeVar, cast

import torch

T = TypeVar("T")
R = TypeVar("R")


class Engine(ABC):
    """Where work is done. The results never depend on the engine, only the time does."""

    @abstractmethod
    def imap(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield `function(item)` for each item, in the order of the items."""

    @abstractmethod
    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return `function(item)` for each item, in their order; workers take them in it, too.

        Cheaper than `imap`: nobody hands items or results over, so results should be small.
        """


class Here(Engine):
    """In this thread, one after the other; for debugging and as the reference."""

    def imap(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the results in order."""
        return map(function, items)

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return the results in order."""
        return [function(item) for item in items]


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

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return the results in order; on an error the rest is left and the first one raised.

        Items are begun in order and what was begun is finished, so that of several errors the one
        that is raised is that of the first item, whoever was faster.
        """
        numbered, taking = enumerate(items), Lock()
        results: dict[int, R] = {}
        errors: dict[int, BaseException] = {}
        stopped = Event()

        def work() -> None:
            while not stopped.is_set():
                with taking:
                    index, item = next(numbered, (-1, None))
                if index < 0:
                    return
                try:
                    results[index] = function(cast("T", item))
                except BaseException as error:  # raised in the caller's thread
                    errors[index] = error
                    stopped.set()

        with ThreadPoolExecutor(self.workers, thread_name_prefix="mergewell") as pool:
            try:
                for future in [pool.submit(work) for _ in range(self.workers)]:
                    future.result()
            finally:
                stopped.set()
        if errors:
            raise errors[min(errors)]
        return [results[index] for index in range(len(results))]


@contextmanager
def one_thread_a_worker() -> Generator[None]:
    """Keep torch from starting threads of its own inside a worker.

    Sums then stay in one order whatever the machine, and workers do not wait for one another: on
    busy cores torch's own threads spin at every operation and can cost ten times the work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_engine(workers: int | None = None) -> Engine:
    """Return the engine for this many workers, one a core if absent; one works right here."""
    workers = workers if workers is not None else os.cpu_count() or 1
    return Here() if workers <= 1 else Threads(workers)
