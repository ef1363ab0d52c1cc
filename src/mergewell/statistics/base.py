"""Statistic: a small summary that can be made in parts and joined.

A state is a plain dictionary of tensors, so it can be saved as an ordinary checkpoint; the empty
dictionary is the neutral state.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Generic, Literal, TypeVar

from torch import Tensor

from mergewell.component import Component
from mergewell.tensor_group import TensorGroup, Value

State = Mapping[str, Tensor]
"""A statistic's unfinished value; the empty one is neutral for `join`."""

B = TypeVar("B")


class Statistic(Component, Generic[B]):
    """A monoid over batches of type B: `start`, `update`, `join`, and the `value` in the end."""

    def start(self) -> State:
        """Return the neutral state."""
        return {}

    @abstractmethod
    def update(self, state: State, batch: B) -> State:
        """Return the state with one more batch."""

    def join(self, left: State, right: State) -> State:
        """Return the state of both parts together; sums by default."""
        return joined(left, right)

    @abstractmethod
    def value(self, state: State) -> Value:
        """Return the finished value."""


class WeightStatistic(Component):
    """A statistic over tensor groups that the executor makes in one or more streaming passes.

    Life: in each pass `update` sees every block of the wanted tensors once, in any order, and the
    parts are summed key by key; then `advance` closes the pass. After the last, `value` gives each
    tensor what belongs to it. Keys that begin with "NAME:" belong to one tensor.
    """

    scope: Literal["tensor", "model"] = "tensor"
    """Over which elements: each tensor by itself, or the whole model."""

    passes: ClassVar[int] = 1

    @abstractmethod
    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return what this block adds in pass `index`; `done` is the state after earlier passes."""

    def wanted(self, done: State, name: str, index: int) -> bool:
        """Return whether the tensor `name` has to be read in pass `index`."""
        del done, name
        return index < self.passes

    def advance(self, done: State, summed: State, index: int) -> State:
        """Return the state after pass `index`, given the state before it and the joined updates."""
        del index
        return {**done, **summed}

    @abstractmethod
    def value(self, done: State, name: str, numel: int) -> Value:
        """Return the finished value for the tensor `name`."""

    def measure(self, groups: Iterable[TensorGroup]) -> dict[str, Value]:
        """Return the values of whole tensors held in memory, by name."""
        held = list(groups)
        done: State = {}
        for index in range(self.passes):
            summed: State = {}
            for group in (g for g in held if self.wanted(done, g.name, index)):
                summed = joined(summed, self.update(done, group, index))
            done = self.advance(done, summed, index)
        return {group.name: self.value(done, group.name, group.whole_numel) for group in held}


def joined(left: State, right: State) -> dict[str, Tensor]:
    """Return the key-by-key sum of two states; keys of one side are taken as they are."""
    result = dict(left)
    for key, part in right.items():
        result[key] = result[key] + part if key in result else part
    return result
