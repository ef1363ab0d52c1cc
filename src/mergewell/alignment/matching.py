"""Matching: the permutations under which two models are most alike, one group at a time.

What is alike is given by evidence: for a dimension of some tensor, how alike every entry of the
reference's is to every entry of the expert's. Each step solves a linear assignment exactly, those
of groups that have others within them (heads with their widths) both at once.
Shapes: n units of a group, m of one within it, E entries of a dimension.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mergewell.alignment.permutations import Axis, PermutationGraph, Permutations
from mergewell.errors import ModelError

SWEEPS = 100
_GAIN = 1e-10  # a smaller relative gain is rounding

OnSweep = Callable[[int, float], None]


class Evidence(Protocol):
    """How alike the entries of one dimension are, the reference's and the expert's."""

    @property
    def axis(self) -> Axis:
        """What runs along the dimension."""
        ...

    def between(self, reference: Tensor, expert: Tensor) -> Tensor:
        """Return how alike units are, [n, n], whose entries stand at int64 [n, c] of [E]."""
        ...


class Likeness(Protocol):
    """How alike the reference and the permuted expert are."""

    def evidence(self, group: str, by: Permutations) -> Iterable[Evidence]:
        """Yield evidence on every dimension with units of a group, other dimensions permuted."""
        ...

    def value(self, groups: Iterable[str], by: Permutations) -> float:
        """Return how alike all is in which one of these groups stands; more is better."""
        ...


@dataclass(frozen=True, slots=True)
class Matched:
    """The permutations that were found."""

    permutations: Permutations
    before: float
    """How alike the models are as they stand."""
    after: float
    """How alike they are when the expert is permuted."""
    sweeps: int
    """Rounds over all groups, the last of them without a gain."""


def match(
    graph: PermutationGraph,
    likeness: Likeness,
    *,
    seed: int = 0,
    sweeps: int = SWEEPS,
    on_sweep: OnSweep | None = None,
) -> Matched:
    """Return permutations of the expert's units under which it is most like the reference.

    Coordinate ascent from the order as it stands: each group in turn, in a new random order in
    every sweep, gets the best permutation given all others, until a sweep gains nothing. A step
    that gains nothing is not taken, so that a model is left alone when it is aligned to itself.

    Source: Ainsworth, Hayase and Srinivasa 2023, "Git Re-Basin", arXiv:2209.04836, algorithm 1.
    Departures: where a group stands in both dimensions of a tensor, so that the step is no linear
    assignment, its outcome is checked before it is taken; heads are matched with their widths.

    Raises:
        ModelError: scipy is not installed.
    """
    solver = _Solver(graph, likeness)
    by: dict[str, Tensor] = graph.identity()
    everything = list(graph.groups)
    before = likeness.value(everything, by)
    generator = torch.Generator().manual_seed(seed)
    done, gained = 0, True
    while gained and done < sweeps:
        gained, done = False, done + 1
        order = torch.randperm(len(everything), generator=generator)
        for group in (everything[int(index)] for index in order):
            proposed = solver.step(group, by)
            held, new = likeness.value(proposed, by), likeness.value(proposed, {**by, **proposed})
            if new - held > _GAIN * max(abs(held), abs(new)):
                by.update(proposed)
                gained = True
        if on_sweep is not None:
            on_sweep(done, likeness.value(everything, by))
    return Matched(by, before, likeness.value(everything, by), done)


class _Solver:
    def __init__(self, graph: PermutationGraph, likeness: Likeness) -> None:
        self._graph, self._likeness = graph, likeness
        self._assign = _linear_sum_assignment()
        self._inner: dict[str, list[str]] = {}
        for inner, outer in graph.within.items():
            self._inner.setdefault(outer, []).append(inner)

    def step(self, group: str, by: Permutations) -> dict[str, Tensor]:
        """Return a better permutation of a group, and of those within it, given all others."""
        outer = self._graph.groups[group].within
        if outer:
            gains = self._gains((outer, group), group, by)
            rows = [self._best(gains[o, :, int(p)]) for o, p in enumerate(by[outer])]
            return {group: torch.stack(rows)}
        inner = self._inner.get(group, [])
        gains = self._gains((group,), group, by, without=inner)
        pairs = {name: self._pairs(group, name, by) for name in inner}
        for values, _ in pairs.values():
            gains = gains + values
        columns = self._best(gains)
        places = torch.arange(len(columns))
        return {
            group: columns,
            **{name: best[places, columns] for name, (_, best) in pairs.items()},
        }

    def _pairs(self, outer: str, inner: str, by: Permutations) -> tuple[Tensor, Tensor]:
        """Return what each pair of outer units gains, [n, n], and their inner orders, [n, n, m]."""
        gains = self._gains((outer, inner), inner, by)
        count, width = gains.shape[0], gains.shape[1]
        values = torch.zeros(count, count, dtype=torch.float64)
        best = torch.zeros(count, count, width, dtype=torch.int64)
        for o in range(count):
            for p in range(count):
                best[o, p] = self._best(gains[o, :, p])
                values[o, p] = gains[o, :, p].gather(1, best[o, p][:, None]).sum()
        return values, best

    def _gains(
        self, groups: Sequence[str], of: str, by: Permutations, without: Sequence[str] = ()
    ) -> Tensor:
        """Return what it gains to put units in others' places, [n, n] or [n, m, n, m]."""
        outer = groups[0]
        others = {name: table for name, table in by.items() if name not in groups}
        undone = by[outer].argsort()  # tables within it, by the outer units' old places
        within = self._graph.within
        for name in others:
            if within.get(name) == outer:
                others[name] = others[name][undone]
        sizes = [self._graph.groups[name].size for name in groups]
        total = torch.zeros(_prod(sizes), _prod(sizes), dtype=torch.float64)
        for evidence in self._likeness.evidence(of, by):
            if not set(without) & set(evidence.axis.groups()):
                table = entries(evidence.axis, groups, sizes)
                total += evidence.between(table, evidence.axis.index(others, within)[table])
        return total.reshape(*sizes, *sizes)

    def _best(self, gains: Tensor) -> Tensor:
        """Return which column each row gets, int64 [n], so that the sum is largest."""
        return torch.from_numpy(self._assign(gains.numpy(), maximize=True)[1]).to(torch.int64)


def entries(axis: Axis, groups: Sequence[str], sizes: Sequence[int]) -> Tensor:
    """Return where the entries of every unit (of every pair, of two groups) stand, [n, c]."""
    units, known = (
        torch.zeros(axis.size, dtype=torch.int64),
        torch.ones(axis.size, dtype=torch.bool),
    )
    for name, size in zip(groups, sizes, strict=True):
        own = axis.units(name)
        units, known = units * size + own, known & (own >= 0)
    entries = known.nonzero()[:, 0]
    # stable: the entries of every unit come in one and the same order
    return entries[units[entries].argsort(stable=True)].reshape(_prod(sizes), -1)


def _prod(sizes: Sequence[int]) -> int:
    return torch.Size(sizes).numel()


def _linear_sum_assignment() -> Any:
    try:
        return importlib.import_module("scipy.optimize").linear_sum_assignment
    except ImportError as error:
        raise ModelError(
            "Matching units needs scipy, which is not installed: pip install 'mergewell[align]'."
        ) from error
