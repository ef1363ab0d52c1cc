"""Activation matching: how alike two models' units are on unlabelled inputs.

Shapes: E entries of a dimension that counts units, S observations (samples times positions).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.alignment.matching import Matched, OnSweep, match
from mergewell.alignment.permutations import Axis, PermutationGraph, Permutations
from mergewell.errors import DataError, ModelError
from mergewell.models.dataflow import Batch, call, evaluating, parts, tensors

Place = tuple[str, int, int]
"""A module, the number of its call, and which of the tensors it returns."""


@dataclass(frozen=True, slots=True)
class Alike:
    """How the entries of one dimension correlate, float64 [E, E]: reference's by expert's."""

    axis: Axis
    table: Tensor

    def between(self, reference: Tensor, expert: Tensor) -> Tensor:
        """Return the sum of the correlations of units' entries, [n, n]."""
        pairs = zip(reference.T, expert.T, strict=True)
        return torch.stack([self.table[left][:, right] for left, right in pairs]).sum(0)


class Correlations:
    """Sum over all places of the correlations of the reference's units with the expert's."""

    def __init__(self, graph: PermutationGraph, found: dict[Place, Tensor]) -> None:
        """Take what `correlations` found."""
        self._graph, self._found = graph, found
        self._axes = {place: axis for place, (_, axis) in observed(graph).items()}

    def evidence(self, group: str, by: Permutations) -> Iterator[Alike]:
        """Yield correlations [E, E] at every place where units of a group are seen."""
        del by  # only one dimension of what is observed holds units
        for place, axis in self._axes.items():
            if group in axis.groups():
                yield Alike(axis, self._found[place])

    def value(self, groups: Iterable[str], by: Permutations) -> float:
        """Return the sum of correlations at the places where one of the groups is seen."""
        wanted, total = set(groups), 0.0
        for place, axis in self._axes.items():
            if wanted & set(axis.groups()):
                index = axis.index(by, self._graph.within)
                total += float(self._found[place].gather(1, index[:, None]).sum())
        return total


def observed(graph: PermutationGraph) -> dict[Place, tuple[int, Axis]]:
    """Return the places where units are seen, with the one dimension that counts them.

    Places where each unit has more entries than it has elsewhere (a flattened map) are left out.
    """
    found: dict[Place, tuple[int, Axis]] = {}
    least: dict[str, int] = {}
    for place, axes in graph.outputs.items():
        dims = [dim for dim, axis in enumerate(axes) if any(True for _ in axis.groups())]
        if len(dims) == 1:
            axis = axes[dims[0]]
            found[place] = (dims[0], axis)
            least |= {g: min(axis.size, least.get(g, axis.size)) for g in axis.groups()}
    return {
        place: (dim, axis)
        for place, (dim, axis) in found.items()
        if any(axis.size == least[group] for group in axis.groups())
    }


def unseen(graph: PermutationGraph) -> tuple[str, ...]:
    """Return the groups whose units no module returns, which activations cannot match."""
    seen = {group for _, axis in observed(graph).values() for group in axis.groups()}
    return tuple(name for name in graph.groups if name not in seen)


def match_activations(
    graph: PermutationGraph,
    reference: nn.Module,
    expert: nn.Module,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    on_sweep: OnSweep | None = None,
) -> Matched:
    """Return the permutations under which an expert's units correlate most with the reference's.

    Groups of `unseen` keep their order.

    Source: arXiv:2209.04836, section 3.1. Departures: correlations and not products, so that large
    units do not decide; where a group is seen at several places (a residual stream) all count.

    Raises:
        DataError: no batches, or activations that are not finite.
        ModelError: a model lacks a module, or scipy is not installed.
    """
    found = correlations(graph, reference, expert, batches)
    return match(graph, Correlations(graph, found), seed=seed, on_sweep=on_sweep)


def correlations(
    graph: PermutationGraph, reference: nn.Module, expert: nn.Module, batches: Sequence[Batch]
) -> dict[Place, Tensor]:
    """Return the correlations of the reference's units with the expert's at each place, [E, E].

    Units that are constant correlate with none. Padding counts as data.

    Raises:
        DataError: no batches, or activations that are not finite.
        ModelError: a model lacks a module.
    """
    if not batches:
        raise DataError("There are no batches to match activations on; give some data.")
    places = observed(graph)
    sums: dict[Place, list[Tensor]] = {}
    with evaluating([reference, expert]):
        for batch in batches:
            first = _seen(reference, batch, places)
            second = _seen(expert, batch, places)
            for place, one in first.items():
                two = second[place]
                count = torch.tensor(float(one.shape[1]), dtype=torch.float64)
                own = [count, one.sum(1), two.sum(1), one.square().sum(1), two.square().sum(1)]
                own.append(one @ two.T)
                held = sums.get(place)
                sums[place] = (
                    own if held is None else [a + b for a, b in zip(held, own, strict=True)]
                )
    return {place: _correlation(place, *own) for place, own in sums.items()}


def _correlation(
    place: Place, n: Tensor, a: Tensor, b: Tensor, aa: Tensor, bb: Tensor, ab: Tensor
) -> Tensor:
    if not bool(torch.isfinite(ab).all()):
        raise DataError(f"{place[0]}: activations are not finite; look at the inputs.")
    covariance = ab / n - torch.outer(a / n, b / n)
    left, right = ((s / n - (m / n).square()).clamp(min=0) for s, m in ((aa, a), (bb, b)))
    flat = 1e-12  # of the mean square: rounding
    scale = torch.outer(
        torch.where(left > flat * aa / n, left, torch.inf).rsqrt(),
        torch.where(right > flat * bb / n, right, torch.inf).rsqrt(),
    )
    return covariance * scale


def _seen(
    module: nn.Module, batch: Batch, places: dict[Place, tuple[int, Axis]]
) -> dict[Place, Tensor]:
    """Return what a module's parts make of a batch at each place, float64 [E, S]."""
    named = dict(parts(module))
    found: dict[Place, Tensor] = {}
    calls: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(_part: nn.Module, _args: object, output: object) -> None:
            number = calls[name] = calls.get(name, -1) + 1
            for index, tensor in enumerate(tensors(output)):
                if (held := places.get((name, number, index))) is not None:
                    rows = tensor.movedim(held[0], 0).reshape(tensor.shape[held[0]], -1)
                    found[name, number, index] = rows.double()

        return hook

    with ExitStack() as hooks:
        for name in dict.fromkeys(name for name, _, _ in places):
            if name not in named:
                raise ModelError(f"A model has no module {name!r}; give two of one architecture.")
            hooks.callback(named[name].register_forward_hook(watch(name)).remove)
        call(module, batch)
    return found
