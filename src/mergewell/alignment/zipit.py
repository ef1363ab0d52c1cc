"""ZipIt: two models merged by joining their most correlated units, also two of the same model.

A group's 2n units become n pairs. What belongs to the two units of a pair is added up over both
models and halved, along whatever dimension they stand: of what makes units that is their mean
(merge), of what reads them each reader's own weight on the mean (unmerge). Pairs that all have one
unit of each model are a permutation, and the result is the average with the aligned expert.

Shapes: n units of a group, E entries of a dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mergewell.alignment.activations import (
    Alike,
    Correlations,
    Place,
    correlations,
    observed,
    unseen,
)
from mergewell.alignment.matching import entries, match
from mergewell.alignment.permutations import Axis, PermutationGraph
from mergewell.alignment.tracing import permutation_graph
from mergewell.errors import DataError, ModelError
from mergewell.models.dataflow import Batch

Pairs = Literal["any", "across"]
"""Which units may be joined: any two, or one of each model only."""


@dataclass(frozen=True, slots=True)
class Zipped:
    """Which units two models were joined in."""

    graph: PermutationGraph

    places: Mapping[str, tuple[Tensor, Tensor]]
    """The place in the merged model of each of the reference's units and the expert's, [n] each."""

    across: tuple[str, ...]
    """Groups whose pairs have one unit of each model: those within others or around them, and all
    when pairs are `across`."""

    unseen: tuple[str, ...]
    """Groups that no module returns, whose units are joined in the order as they stand."""

    within: float
    """Share of the pairs in which both units are of one model."""


def zipped(
    reference: nn.Module,
    expert: nn.Module,
    given: Sequence[Batch],
    *,
    pairs: Pairs = "any",
    seed: int = 0,
) -> Zipped:
    """Merge a reference into an expert, in place, and return which units were joined.

    Activations come from three runs of both models on the batches. Statistics of BatchNorm are
    halved sums too and should be estimated anew. Outputs are the mean of both models'.

    Source: Stoica et al. 2024, "ZipIt! Merging models from different tasks without training",
    arXiv:2305.03053, sections 4.1 to 4.3. Departures: the graph is found and not written for each
    architecture; every unit is in one pair (their matching may join a pair with a third unit);
    all layers are merged (no partial zip); heads of attention and their widths are matched
    across, by assignment.

    Raises:
        ModelError: nothing can be joined, the models differ, or scipy is not installed.
        DataError: no inputs, or inputs that cannot be used.
    """
    if not given:
        raise DataError("There are no inputs to compare units on; give two or more.")
    first = given[0]
    few = first[:2] if isinstance(first, Tensor) else {n: t[:2] for n, t in first.items()}
    graph = permutation_graph(expert, few)
    if not graph.groups:
        raise ModelError(
            f"{type(expert).__name__} has no units that can be joined (see the rules of align): "
            "merge these models as they are."
        )
    joined = _joinable(graph) if pairs == "any" else ()
    between = correlations(graph, reference, expert, given)
    own = [correlations(graph, model, model, given) for model in (reference, expert)] * bool(joined)
    by = match(graph, Correlations(graph, between), seed=seed).permutations
    kept = {group: table for group, table in by.items() if group not in joined}
    places: dict[str, tuple[Tensor, Tensor]] = {}
    for group in joined:
        tables = [_units(graph, group, found) for found in (between, *own)]
        places[group] = paired(*tables)
    merge = _Merge(graph, kept, places)
    theirs, states = reference.state_dict(), expert.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in {id(t): (n, t) for n, t in states.items()}.values():  # each once
            if tensor.is_floating_point():
                tensor.copy_(merge.tensor(name, theirs[name], tensor.detach().clone()))
    same = sum(_within_one(*both) for both in places.values())
    units = sum(table.numel() for table in graph.identity().values())
    flat = {g: (torch.arange(len(t)), t.argsort()) for g, t in kept.items() if t.ndim == 1}
    return Zipped(graph, {**places, **flat}, tuple(kept), unseen(graph), same / units)


def paired(across: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of each unit of two models when the most alike are joined first, [n] each.

    across: how alike the first's units are to the second's, [n, n]; first, second: to their own.
    """
    count = len(across)
    table = torch.cat([torch.cat([first, across], 1), torch.cat([across.T, second], 1)])
    table.fill_diagonal_(-torch.inf)
    places = torch.full((2 * count,), -1)
    best, partner = table.max(1)
    for place in range(count):
        one = int(best.argmax())
        two = int(partner[one])
        places[[one, two]] = place
        best[[one, two]] = -torch.inf
        table[:, [one, two]] = -torch.inf
        stale = (places < 0) & ((partner == one) | (partner == two))
        best[stale], partner[stale] = table[stale].max(1)
    return places[:count], places[count:]


@dataclass(frozen=True, slots=True)
class _Merge:
    graph: PermutationGraph
    kept: Mapping[str, Tensor]
    """Permutations of the expert's units of groups that are matched across."""
    places: Mapping[str, tuple[Tensor, Tensor]]

    def tensor(self, name: str, reference: Tensor, expert: Tensor) -> Tensor:
        """Return half the sum of both models' entries at their new places."""
        axes = self.graph.axes.get(name, ())
        moved = self.graph.permuted_tensor(name, expert, self.kept)
        total = torch.zeros_like(expert)
        for side, tensor in enumerate((reference, moved)):
            if tensor.shape != total.shape:
                raise ModelError(
                    f"{name} has shape {list(tensor.shape)} in the reference and "
                    f"{list(total.shape)} in the expert; give two models of one architecture."
                )
            for dim, axis in enumerate(axes):
                if any(group in self.places for group in axis.groups()):
                    index = self._entries(axis, side).to(tensor.device)
                    tensor = torch.zeros_like(tensor).index_add_(dim, index, tensor)
            total += tensor
        return total / 2

    def _entries(self, axis: Axis, side: int) -> Tensor:
        """Return the new place of every entry of an axis, int64 [E]."""
        if axis.kind == "sum":
            starts = [sum(part.size for part in axis.parts[:i]) for i in range(len(axis.parts))]
            found = [self._entries(part, side) for part in axis.parts]
            return torch.cat([start + own for start, own in zip(starts, found, strict=True)])
        if axis.kind == "product":
            made = torch.zeros(1, dtype=torch.int64)
            for part in axis.parts:
                made = (made[:, None] * part.size + self._entries(part, side)).reshape(-1)
            return made
        if axis.kind == "group" and axis.group in self.places:
            return self.places[axis.group][side]
        return torch.arange(axis.size)


def _joinable(graph: PermutationGraph) -> tuple[str, ...]:
    """Return the groups that are seen, stand alone, and do not cross another along a dimension."""
    nested = {name for pair in graph.within.items() for name in pair}
    crossed = {
        group
        for axes in graph.axes.values()
        for axis in axes
        for product in _products(axis)
        if len(own := list(product.groups())) > 1
        for group in own
    }
    hidden = nested | crossed | set(unseen(graph))
    return tuple(name for name in graph.groups if name not in hidden)


def _products(axis: Axis) -> list[Axis]:
    own = [axis] if axis.kind == "product" else []
    return own + [found for part in axis.parts for found in _products(part)]


def _units(graph: PermutationGraph, group: str, found: Mapping[Place, Tensor]) -> Tensor:
    """Return how alike units of a group are, summed over the places where it is seen, [n, n]."""
    size = graph.groups[group].size
    total = torch.zeros(size, size, dtype=torch.float64)
    for place, (_, axis) in observed(graph).items():
        if group in axis.groups():
            table = entries(axis, [group], [size])
            total += Alike(axis, found[place]).between(table, table)
    return total


def _within_one(first: Tensor, second: Tensor) -> int:
    """Return how many pairs are of one model."""
    return int((first.bincount(minlength=len(first)) != 1).sum())
