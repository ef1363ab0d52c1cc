"""Which merges and statistics have a fused form, and what it sees: blocks as they are stored.

A file here has the name of a method's file and defines `merge(method, block)`, or of a statistic's
and defines `program(statistic)`. They return None for what they do not cover, and the torch form
does it. Tests hold both to the same bits.

Shapes: K experts, n elements of the block.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergewell.methods.base import MergeMethod
from mergewell.statistics.base import State, WeightStatistic
from mergewell.tensor_group import Value

Raw = NDArray[Any]
"""Stored elements: uint16 holds the bits of bfloat16, float32 is itself."""

_SHARED = {
    "base", "compiler", "four_ops", "ops", "options", "order_ops", "product_ops", "random_ops",
    "rank_ops", "sparse_ops", "thresholds",
}  # fmt: skip
"""Files here that are nobody's form."""

SMALLEST = 1 << 15
"""Elements of a whole tensor below which loading compiled code does not pay."""

STORED: Mapping[torch.dtype, np.dtype[Any]] = {
    torch.bfloat16: np.dtype(np.uint16),
    torch.float32: np.dtype(np.float32),
}
"""Dtypes that fused forms read and write."""

_COMPUTED = {torch.bfloat16: np.dtype(np.float32), torch.float32: np.dtype(np.float64)}


@dataclass(frozen=True, slots=True)
class RawBlock:
    """A block of every model, flat, in the stored dtype that all of them share."""

    name: str
    experts: tuple[Raw, ...]
    """K arrays [n]."""

    base: Raw | None
    coefficients: NDArray[Any]
    """Coefficients [K] in the dtype to compute in."""

    seed: int
    offset: int
    numel: int
    statistics: Mapping[WeightStatistic, Value]

    reference: Raw
    """What the change is told against, [n]."""

    row: int
    """Elements of a row; blocks for methods on rows hold whole ones."""

    @property
    def addresses(self) -> NDArray[np.int64]:
        """Where the experts' elements begin, [K]; valid while this block lives."""
        return np.array([expert.ctypes.data for expert in self.experts], np.int64)

    @property
    def computed(self) -> np.dtype[Any]:
        """The dtype to compute in."""
        return self.coefficients.dtype


def raw_block(
    name: str,
    experts: Sequence[Tensor],
    base: Tensor | None,
    *,
    coefficients: Sequence[float],
    seed: int,
    offset: int,
    numel: int,
    statistics: Mapping[WeightStatistic, Value],
    reference: Tensor | None = None,
    row: int | None = None,
    smallest: int = SMALLEST,
) -> RawBlock | None:
    """Return the block as it is stored; None where dtypes differ or have no fused form.

    The reference is the base, or else the first expert, unless given; a block is one row, too.
    """
    tensors = [*experts, *([base] if base is not None else [])]
    tensors += [reference] if reference is not None else []
    dtype = tensors[0].dtype
    if dtype not in STORED or any(t.dtype != dtype for t in tensors):
        return None
    if max(numel, tensors[0].numel()) < smallest:
        return None
    return RawBlock(
        name,
        tuple(stored(tensor) for tensor in experts),
        stored(base) if base is not None else None,
        np.array(coefficients, dtype=_COMPUTED[dtype]),
        seed,
        offset,
        numel,
        statistics,
        stored(reference if reference is not None else base if base is not None else experts[0]),
        row if row is not None else max(1, tensors[0].numel()),
    )


def stored(tensor: Tensor) -> Raw:
    """Return a tensor's elements as an array without a copy; bfloat16 as its bits."""
    flat = tensor.reshape(-1)
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


def as_tensor(raw: Raw) -> Tensor:
    """Return stored elements as a tensor again, without a copy."""
    tensor = torch.from_numpy(raw)
    return tensor.view(torch.bfloat16) if raw.dtype == np.uint16 else tensor


@dataclass(frozen=True, slots=True)
class Fused:
    """A merged block, and what was seen on the way."""

    out: Raw
    finite: bool
    """Whether all inputs and the result are."""

    changed: bool
    """Whether any element differs from the reference's."""

    moved: float
    """Sum of the squared differences."""

    original: float
    """Sum of the squared elements of the reference."""

    @classmethod
    def of(cls, out: Raw, tally: object) -> Fused:
        """Take in what `ops.tallied` returned."""
        finite, changed, moved, original = cast("tuple[bool, bool, float, float]", tally)
        return cls(out, bool(finite), bool(changed), float(moved), float(original))


class Program(ABC):
    """Another way to the value of a weight statistic, from blocks as they are stored.

    The life of its passes is that of `WeightStatistic`, whose docstrings hold here too.
    """

    passes: int = 1

    def __init__(self, statistic: WeightStatistic) -> None:
        """Take the place of this statistic."""
        self.statistic = statistic

    @abstractmethod
    def update(self, done: State, block: RawBlock, index: int) -> State:
        """Return what this block adds in pass `index`."""

    def wanted(self, done: State, name: str, index: int) -> bool:
        """Return whether the tensor `name` has to be read in pass `index`."""
        del done, name
        return index < self.passes

    def advance(self, done: State, summed: State, index: int) -> State:
        """Return the state after pass `index`."""
        return self.statistic.advance(done, summed, index)

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return the finished value for the tensor `name`."""
        return self.statistic.value(done, name, numel)


def has_form(method: MergeMethod) -> bool:
    """Return whether there is a fused form for some parameters of this method."""
    return hasattr(_module(method.component_name()), "merge")


def merge(method: MergeMethod, block: RawBlock) -> Fused | None:
    """Return the merged block in its stored dtype, or None where no fused form covers it."""
    if not has_form(method):
        return None
    return cast("Fused | None", cast("Any", _module(method.component_name())).merge(method, block))


def program(statistic: WeightStatistic) -> Program | None:
    """Return the fused form of a statistic, or None where there is none."""
    module: Any = _module(statistic.component_name())
    if not hasattr(module, "program"):
        return None
    return cast("Program | None", module.program(statistic))


def not_finite(block: RawBlock) -> bool:
    """Return whether any input of the block is NaN or Inf."""
    from mergewell.kernels import ops  # compiled code is loaded when it is needed

    arrays = [*block.experts, *([block.base] if block.base is not None else [])]
    return any(bool(ops.not_finite(array)) for array in arrays)


@cache
def _module(name: str) -> ModuleType | None:
    path = importlib.import_module("mergewell.kernels").__path__
    found = {module.name for module in pkgutil.iter_modules(path)} - _SHARED
    return importlib.import_module(f"mergewell.kernels.{name}") if name in found else None
