"""Which merges and statistics have a fused form, and what it sees: blocks as they are stored.

A file here has the name of a method's or a statistic's file and defines `merge(method, block)` or
`update(statistic, done, block, index)`. It returns None for what it does not cover, and the torch
form does it. Tests hold both to the same bits.

Shapes: K experts, n elements of the block.
"""

from __future__ import annotations

import importlib
import pkgutil
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

SMALLEST = 1 << 15
"""Elements below which loading compiled code does not pay."""

_STORED = {torch.bfloat16: np.dtype(np.uint16), torch.float32: np.dtype(np.float32)}
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
) -> RawBlock | None:
    """Return the block as it is stored; None where dtypes differ or have no fused form."""
    tensors = [*experts, *([base] if base is not None else [])]
    dtype = tensors[0].dtype
    if dtype not in _STORED or any(t.dtype != dtype for t in tensors):
        return None
    if tensors[0].numel() < SMALLEST:
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
    )


def stored(tensor: Tensor) -> Raw:
    """Return a tensor's elements as an array without a copy; bfloat16 as its bits."""
    flat = tensor.reshape(-1)
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


def as_tensor(raw: Raw) -> Tensor:
    """Return stored elements as a tensor again, without a copy."""
    tensor = torch.from_numpy(raw)
    return tensor.view(torch.bfloat16) if raw.dtype == np.uint16 else tensor


def merge(method: MergeMethod, block: RawBlock) -> Raw | None:
    """Return the merged block in its stored dtype, or None where no fused form covers it."""
    module = _module(method.component_name())
    if module is None or not hasattr(module, "merge"):
        return None
    return cast("Raw | None", module.merge(method, block))


def update(statistic: WeightStatistic, done: State, block: RawBlock, index: int) -> State | None:
    """Return what a block adds to a statistic, or None where no fused form covers it."""
    module = _module(statistic.component_name())
    if module is None or not hasattr(module, "update"):
        return None
    return cast("State | None", module.update(statistic, done, block, index))


def not_finite(block: RawBlock) -> bool:
    """Return whether any input of the block is NaN or Inf."""
    from mergewell.kernels import ops  # compiled code is loaded when it is needed

    arrays = [*block.experts, *([block.base] if block.base is not None else [])]
    return any(bool(ops.not_finite(array)) for array in arrays)


def change(merged: Raw, original: Raw) -> tuple[bool, float, float]:
    """Return whether all is finite, and the squared differences and originals, summed."""
    from mergewell.kernels import ops  # compiled code is loaded when it is needed

    finite, moved, size = cast("tuple[bool, float, float]", ops.change(merged, original))
    return bool(finite), float(moved), float(size)


@cache
def _module(name: str) -> ModuleType | None:
    path = importlib.import_module("mergewell.kernels").__path__
    found = {module.name for module in pkgutil.iter_modules(path)} - {"base", "ops"}
    return importlib.import_module(f"mergewell.kernels.{name}") if name in found else None
