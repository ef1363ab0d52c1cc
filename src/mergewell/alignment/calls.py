"""Calls: one recorded operation, and what all rules share.

A rule unifies the symbols of dimensions that must be permuted alike, fixes those whose order the
operation looks at, and returns the symbols of what the operation makes. What has no rule is taken
to look at every order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergewell.alignment.symbols import Symbol, unify
from mergewell.models.dataflow import Op, Value

Axes = tuple[Symbol, ...]
"""The symbols along a tensor's dimensions."""


@dataclass(slots=True)
class Call:
    """One operation with its arguments by name, and what is known of its inputs."""

    op: Op
    arguments: Mapping[str, Any]
    known: Callable[[Value], Axes]
    hidden: list[Axes] = field(default_factory=list[Axes])
    """Axes of what the operation holds for a while: its inputs without what it sums over."""

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def axes(self, name: str) -> Axes:
        """Return the axes of an argument that is a tensor."""
        given = self.arguments[name]
        if isinstance(given, Value):
            return self.known(given)
        return tuple(Symbol(size) for size in given.shape)  # a constant of one element

    def has(self, name: str) -> bool:
        """Return whether an argument is a tensor with axes."""
        return isinstance(self.arguments.get(name), Value)

    def dim(self, name: str, count: int) -> int:
        """Return a dimension that an argument names, counted from the front."""
        return int(self.arguments[name]) % max(count, 1)

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Return the shape of what the operation made."""
        return tuple(self.op.outputs[index].tensor.shape)


_POINTWISE_TOO = ("hardswish", "_prelu_kernel", "copy", "log_sigmoid_forward")
"""Pointwise operations that torch does not tag as such."""

Rule = Callable[[Call], "Sequence[Axes]"]
"""Returns the axes of an operation's outputs; those left out are new."""


class Rules(dict[str, Rule]):
    """Rules by the operation's name."""

    def of(self, *names: str) -> Callable[[Rule], Rule]:
        """Take a function in as the rule of operations of these names."""

        def take(function: Rule) -> Rule:
            self.update(dict.fromkeys(names, function))
            return function

        return take


def is_pointwise(op: Op) -> bool:
    """Return whether an operation treats every element alike, after broadcasting."""
    tags = op.function.tags if op.function is not None else ()
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    return torch.Tag.pointwise in tags or op.name in _POINTWISE_TOO


def pointwise(call: Call) -> list[Axes]:
    """Unify the dimensions that meet in a pointwise operation."""
    operands = [call.known(value) for value in call.op.inputs]
    if call.op.name == "copy":  # what is written over does not matter
        operands = operands[1:]
    return [broadcast(operands, call.shape())]


def broadcast(operands: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """Return the axes of a shape to which operands are broadcast; where none has units: new ones.

    Along a new axis all entries are equal, so that any order is as good.
    """
    made: list[Symbol] = []
    for place, size in enumerate(reversed(shape), 1):
        met = [axes[-place] for axes in operands if len(axes) >= place and axes[-place].size != 1]
        for other in met[1:]:
            unify(met[0], other)
        made.append(met[0] if met else Symbol(size))
    return tuple(reversed(made))
