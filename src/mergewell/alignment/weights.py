"""Weight matching: how alike the weights of two models are, unit by unit.

Shapes: n units, E entries of a dimension, R all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergewell.alignment.matching import Matched, OnSweep, match
from mergewell.alignment.permutations import Axis, PermutationGraph, Permutations


@dataclass(frozen=True, slots=True)
class Rows:
    """A parameter of both models with one dimension in front, float64 [E, R]."""

    axis: Axis
    reference: Tensor
    expert: Tensor

    def between(self, reference: Tensor, expert: Tensor) -> Tensor:
        """Return the products of units' rows, [n, n]."""
        return self.reference[reference].flatten(1) @ self.expert[expert].flatten(1).T


class Weights:
    """Sum over all parameters of the product of the reference's with the permuted expert's.

    The larger it is, the smaller is the distance between the two.
    """

    def __init__(
        self,
        graph: PermutationGraph,
        reference: Mapping[str, Tensor],
        expert: Mapping[str, Tensor],
    ) -> None:
        """Compare the floating-point tensors that both mappings name."""
        self._graph = graph
        self._reference, self._expert = reference, expert
        self._of: dict[str, list[str]] = {name: [] for name in graph.groups}
        for name, axes in graph.axes.items():
            if name in reference and reference[name].is_floating_point():
                for group in {group for axis in axes for group in axis.groups()}:
                    self._of[group].append(name)

    def evidence(self, group: str, by: Permutations) -> Iterator[Rows]:
        """Yield the rows along every dimension with units of a group."""
        for name in self._of[group]:
            axes = self._graph.axes[name]
            for dim, axis in enumerate(axes):
                if group not in axis.groups():
                    continue
                expert = self._expert[name].detach()
                for other, along in enumerate(axes):
                    if other != dim:
                        index = along.index(by, self._graph.within)
                        expert = expert.index_select(other, index)
                own = self._reference[name].detach()
                yield Rows(axis, _rows(own, dim), _rows(expert, dim))

    def value(self, groups: Iterable[str], by: Permutations) -> float:
        """Return the sum of products over the parameters in which one of the groups stands."""
        names = dict.fromkeys(name for group in groups for name in self._of[group])
        total = 0.0
        for name in names:
            expert = self._graph.permuted_tensor(name, self._expert[name].detach(), by)
            total += float((self._reference[name].detach().double() * expert.double()).sum())
        return total


def match_weights(
    graph: PermutationGraph,
    reference: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    *,
    seed: int = 0,
    on_sweep: OnSweep | None = None,
) -> Matched:
    """Return the permutations that bring an expert's weights nearest to the reference's.

    reference, expert: parameters by name; leave buffers out, whose scale says little.

    Source: arXiv:2209.04836, section 3.2. Raises: as `match`.
    """
    return match(graph, Weights(graph, reference, expert), seed=seed, on_sweep=on_sweep)


def distance(reference: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> float:
    """Return the Euclidean distance between two sets of parameters."""
    squares = [
        float((tensor.detach().double() - expert[name].detach().double()).square().sum())
        for name, tensor in reference.items()
        if tensor.is_floating_point()
    ]
    return float(torch.tensor(squares, dtype=torch.float64).sum().sqrt())


def _rows(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1).double()
