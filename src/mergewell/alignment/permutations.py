"""Permutations: which dimensions of a module's tensors are permuted together, and how.

Shapes: n units of a group, m units of the group that another one lies within.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergewell.errors import ModelError

Permutations = Mapping[str, Tensor]
"""The old place of every unit by group, int64 [n], or [m, n] for a group within another."""


@dataclass(frozen=True, slots=True)
class Axis:
    """What runs along a dimension: units of a group, what is kept in order, or parts of these.

    A product's parts lie one inside the other, the last running fastest (heads times width); a
    sum's parts one after the other (queries, keys, values).
    """

    kind: Literal["group", "fixed", "product", "sum"]
    size: int
    group: str = ""
    parts: tuple[Axis, ...] = ()

    def groups(self) -> Iterator[str]:
        """Yield the groups of the axis from left to right, those that occur twice twice."""
        if self.kind == "group":
            yield self.group
        for part in self.parts:
            yield from part.groups()

    def index(self, permutations: Permutations, within: Mapping[str, str]) -> Tensor:
        """Return the old place of every entry, int64 [size]; groups not named keep their order."""
        return self._places(permutations, within, {}, 1).reshape(-1)

    def units(self, group: str) -> Tensor:
        """Return which unit of a group every entry belongs to, int64 [size]; -1 for none."""
        if self.kind == "group" and self.group == group:
            return torch.arange(self.size)
        if self.kind == "sum":
            return torch.cat([part.units(group) for part in self.parts])
        made = torch.full((1,), -1)
        for part in self.parts:
            made = torch.maximum(made[:, None], part.units(group)).reshape(-1)
        return made if self.parts else made.expand(self.size)

    def _places(
        self,
        permutations: Permutations,
        within: Mapping[str, str],
        outer: Mapping[str, Tensor],
        rows: int,
    ) -> Tensor:
        """Return old places, [rows, size]; `outer` are units of groups around, [rows] each."""
        if self.kind == "sum":
            starts = [sum(part.size for part in self.parts[:i]) for i in range(len(self.parts))]
            places = [part._places(permutations, within, outer, rows) for part in self.parts]
            return torch.cat([s + p for s, p in zip(starts, places, strict=True)], 1)
        if self.kind == "product":
            around, made = dict(outer), torch.zeros(rows, 1, dtype=torch.int64)
            for part in self.parts:
                count = made.shape[1]
                places = part._places(permutations, within, around, rows * count)
                made = (made.reshape(-1, 1) * part.size + places).reshape(rows, -1)
                around = {g: units.repeat_interleave(part.size) for g, units in around.items()}
                if part.kind == "group":
                    around[part.group] = torch.arange(part.size).repeat(rows * count)
            return made
        table = permutations.get(self.group) if self.kind == "group" else None
        if table is None:
            return torch.arange(self.size).expand(rows, -1)
        if table.ndim == 1:
            return table.expand(rows, -1)
        return table[outer[within[self.group]]]


@dataclass(frozen=True, slots=True)
class Group:
    """Units that can be permuted without a change of what the module computes."""

    name: str
    """The first parameter and dimension in which it stands."""

    size: int
    """Number of units, n."""

    within: str = ""
    """The group in each of whose units these may be permuted in another way (widths of heads)."""


@dataclass(frozen=True, slots=True)
class PermutationGraph:
    """Groups of units, and where they stand in a module's parameters and buffers."""

    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[Axis, ...]]
    """Of every parameter and buffer of the state in which there is a group, by dimension."""

    fixed: Mapping[str, str]
    """`parameter:dimension` of what is kept in order wholly, with the reason."""

    outputs: Mapping[tuple[str, int, int], tuple[Axis, ...]]
    """Of what modules return: by module, number of the call and of the tensor."""

    @property
    def within(self) -> dict[str, str]:
        """The outer group of every group that lies within another."""
        return {name: group.within for name, group in self.groups.items() if group.within}

    def identity(self) -> dict[str, Tensor]:
        """Return the permutations that leave everything in place."""
        return {name: self._tables(group) for name, group in self.groups.items()}

    def random(self, *, seed: int) -> dict[str, Tensor]:
        """Return a random permutation of every group."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.rand(places.shape, generator=generator).argsort(-1)
            for name, places in self.identity().items()
        }

    def permuted(self, state: Mapping[str, Tensor], by: Permutations) -> dict[str, Tensor]:
        """Return the tensors of a state with their units permuted; others as they are.

        Raises:
            ModelError: a tensor has another shape than in the module that was traced.
        """
        return {name: self.permuted_tensor(name, tensor, by) for name, tensor in state.items()}

    def permuted_tensor(self, name: str, tensor: Tensor, by: Permutations) -> Tensor:
        """Return one tensor of a state with its units permuted.

        Raises:
            ModelError: it has another shape than in the module that was traced.
        """
        axes = self.axes.get(name, ())
        if axes and tuple(axis.size for axis in axes) != tuple(tensor.shape):
            raise ModelError(
                f"{name} has shape {list(tensor.shape)} where the traced module has "
                f"{[axis.size for axis in axes]}; give a model of one architecture."
            )
        for dim, axis in enumerate(axes):
            if any(group in by for group in axis.groups()):
                tensor = tensor.index_select(dim, axis.index(by, self.within).to(tensor.device))
        return tensor

    def moved(self, by: Permutations) -> float:
        """Return the share of units that are not where they were, in [0, 1]."""
        still = total = 0
        for name, places in self.identity().items():
            still += int((by[name] == places).sum())
            total += places.numel()
        return 1 - still / total if total else 0.0

    def _tables(self, group: Group) -> Tensor:
        places = torch.arange(group.size)
        outer = self.groups.get(group.within)
        return places if outer is None else places.repeat(outer.size, 1)
