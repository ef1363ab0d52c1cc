"""Activation: a pointwise function found in a network, replayed from its recorded operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a tensor in a recorded call: 0 is the input, n the result of the n-th step."""

    index: int


@dataclass(frozen=True, slots=True)
class Step:
    """One recorded operation, by its name (`aten.gelu.default`), with slots for tensors."""

    operation: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, values: list[Tensor]) -> Tensor:
        """Return the operation's result; the values are never written to."""
        args = [values[arg.index] if isinstance(arg, Slot) else arg for arg in self.args]
        kwargs = {
            name: values[arg.index] if isinstance(arg, Slot) else arg
            for name, arg in self.kwargs.items()
        }
        name = self.operation.split(".")[1]
        if name == "_to_copy":  # a cast that the network made in its own dtype, not in ours
            wanted = kwargs.get("dtype") or args[0].dtype
            return args[0] if wanted.is_floating_point else args[0].to(wanted)
        if name.endswith("_"):
            args[0] = args[0].clone()
        return _operator(self.operation)(*args, **kwargs)


@cache
def _operator(operation: str) -> Callable[..., Tensor]:
    namespace, name, overload = operation.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


@dataclass(frozen=True, slots=True)
class Activation:
    """A pointwise function, in whatever floating dtype it is called."""

    name: str
    """One of the known functions, or `custom`."""

    steps: tuple[Step, ...]

    slope: float = 0.0
    """Of `leaky_relu`, on the negative side."""

    def __call__(self, z: Tensor) -> Tensor:
        """Return the activation of pre-activations `z`, in their shape."""
        values = [z]
        for step in self.steps:
            values.append(step.run(values))
        return values[-1].expand_as(z)


IDENTITY = Activation("identity", ())

SIGMOID = Activation("sigmoid", (Step("aten.sigmoid.default", (Slot(0),), {}),))

_KNOWN: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "squared_relu": lambda z: functional.relu(z) ** 2,
    "elu": functional.elu,
    "selu": functional.selu,
    "softplus": functional.softplus,
    "mish": functional.mish,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
}


def named(activation: Activation) -> Activation:
    """Return the activation under its known name, found by comparing values on a grid."""
    grid = _grid()
    values = activation(grid)
    if _equal(values, grid):
        return replace(activation, name="identity")
    for name, function in _KNOWN.items():
        if _equal(values, function(grid)):
            return replace(activation, name=name)
    slope = -float(activation(grid.new_tensor([-1.0])))
    if _equal(values, functional.leaky_relu(grid, slope)):
        return replace(activation, name="leaky_relu", slope=slope)
    return activation


def is_affine(activation: Activation) -> bool:
    """Return whether the function is a straight line on a grid."""
    values = activation(_grid())
    bend = values.diff(n=2).abs().max()
    return bool(bend <= 1e-9 * values.abs().max().clamp(min=1.0))


def _grid() -> Tensor:
    return torch.linspace(-12.0, 12.0, 4801, dtype=torch.float64)


def _equal(left: Tensor, right: Tensor) -> bool:
    return bool(((left - right).abs() <= 1e-6 * right.abs().clamp(min=1.0)).all())
