"""Strategies: which candidates are tried, given what those before cost.

A grid is known from the start; a line search asks for one candidate after the other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from mergewell.errors import RecipeError
from mergewell.tune.objective import Losses
from mergewell.tune.space import Candidate, axes
from mergewell.tune.trying import by_merge

_GOLDEN = (math.sqrt(5) - 1) / 2
_CLOSE = 1.1
"""A line search ends where its bracket's ends differ by this factor."""


class Strategy(ABC):
    """Asks for candidates and is told what they cost."""

    total: int
    """Candidates that are asked for at most."""

    methods: frozenset[str]
    """Methods that are tried."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._done: list[tuple[Candidate, Losses]] = []

    @abstractmethod
    def ask(self) -> Sequence[Candidate]:
        """Return the candidates to try next, in this order; none where all is done."""

    def tell(self, candidate: Candidate, losses: Losses) -> None:
        """Take what a candidate costs, input by input."""
        self._done.append((candidate, losses))

    def done(self) -> Sequence[tuple[Candidate, Losses]]:
        """Return the candidates that are judged, in the order in which they were."""
        return self._done


class Grid(Strategy):
    """Candidates that are known from the start; those that share a merge go together."""

    def __init__(self, tried: Sequence[Candidate]) -> None:
        """Take the candidates.

        Raises:
            RecipeError: there is none.
        """
        super().__init__()
        if not tried:
            raise RecipeError("There is no candidate to try; name a method.")
        self._waiting = by_merge(tried)
        self.total = len(tried)
        self.methods = frozenset(candidate.method for candidate in tried)

    def ask(self) -> Sequence[Candidate]:
        """Return all, once."""
        given, self._waiting = self._waiting, []
        return given


class Lines(Strategy):
    """Golden section along a method's scale; coordinate by coordinate where there are more.

    Of a coordinate that is no scale all values of the method's `search` are tried. The scale is
    searched between the ends of its values, by their logarithm. Assumes one valley along the scale.
    Source: Kiefer 1953 (golden section); cyclic coordinate search.
    """

    def __init__(self, methods: Sequence[str], *, budget: int = 10) -> None:
        """Take the methods, and how many candidates each may have.

        Raises:
            RecipeError: no method, an unknown one, one that needs a calibration, or no budget.
        """
        super().__init__()
        if not methods or budget < 1:
            raise RecipeError("A line search needs a method and a budget of at least 1.")
        self.methods = frozenset(methods)
        self.total = budget * len(self.methods)
        self._searches = [_search(axes(m), budget, m) for m in dict.fromkeys(methods)]
        self._value: float | None = None

    def ask(self) -> Sequence[Candidate]:
        """Return one candidate, or none."""
        while self._searches:
            try:
                if self._value is None:
                    return [next(self._searches[0])]
                return [self._searches[0].send(self._value)]
            except StopIteration:
                self._searches.pop(0)
                self._value = None
        return []

    def tell(self, candidate: Candidate, losses: Losses) -> None:
        """Go on from what the candidate costs."""
        super().tell(candidate, losses)
        self._value = float(np.mean([task.mean() for task in losses]))


def _search(
    values: Mapping[str, tuple[Any, ...]], budget: int, method: str
) -> Generator[Candidate, float, None]:
    setting = {name: some[len(some) // 2] for name, some in values.items()}
    known: dict[str, float] = {}

    def cost(setting: Mapping[str, Any]) -> Generator[Candidate, float, float]:
        rest = {name: value for name, value in setting.items() if name != "scale"}
        candidate = Candidate(method, rest, setting.get("scale"))
        key = f"{candidate.shared} {candidate.scale}"
        if key not in known:
            if len(known) == budget:
                raise _SpentError
            known[key] = yield candidate
        return known[key]

    try:
        least = yield from cost(setting)
        for _ in range(budget):
            before = dict(setting)
            for name, some in sorted(values.items(), key=lambda item: item[0] != "scale"):
                points = _golden(min(some), max(some)) if name == "scale" else _each(some)
                value: float | None = None
                try:
                    while True:
                        point = points.send(value) if value is not None else next(points)
                        value = yield from cost({**setting, name: point})
                        if value < least:
                            least, setting = value, {**setting, name: point}
                except StopIteration:
                    continue
            if setting == before:
                return
    except _SpentError:
        return


class _SpentError(Exception):
    """The budget of a method is spent."""


def _each(values: Sequence[Any]) -> Generator[Any, float, None]:
    for value in values:  # noqa: UP028  (a tuple's iterator takes nothing that is sent)
        yield value


def _golden(low: float, high: float) -> Generator[float, float, None]:
    """Yield points of a bracket and be sent what they cost, until its ends are close."""
    logs = low > 0
    a, b = (math.log(low), math.log(high)) if logs else (low, high)
    close = math.log(_CLOSE) if logs else (high - low) * (_CLOSE - 1)

    def at(x: float) -> float:
        return float(f"{math.exp(x) if logs else x:.4g}")

    one, two = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
    cost_one = yield at(one)
    cost_two = yield at(two)
    while b - a > close:
        if cost_one <= cost_two:
            b, two, cost_two = two, one, cost_one
            one = b - _GOLDEN * (b - a)
            cost_one = yield at(one)
        else:
            a, one, cost_one = one, two, cost_two
            two = a + _GOLDEN * (b - a)
            cost_two = yield at(two)
