"""Small groups with Gram matrices, for tests of the methods that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergewell.tensor_group import TensorGroup


def group(
    base: list[Any],
    experts: Sequence[list[Any]],
    grams: Sequence[list[Any]] | None,
    *,
    rows: Sequence[float] | None = None,
    coefficients: Sequence[float] | None = None,
    along: int = 1,
) -> TensorGroup:
    """Return a group with the Gram matrices of each expert's inputs, means unless `rows` is."""
    known: dict[str, Tensor] = {}
    if grams is not None:
        stacked = torch.tensor(grams, dtype=torch.float64)
        known["gram"] = stacked if stacked.dim() == 4 else stacked[:, None]
        known["gram_rows"] = torch.tensor(rows or [1.0] * len(experts), dtype=torch.float64)
        known["gram_along"] = torch.tensor(along)
    return TensorGroup(
        "w",
        tuple(torch.tensor(expert, dtype=torch.float64) for expert in experts),
        torch.tensor(coefficients or [1.0] * len(experts), dtype=torch.float64),
        torch.tensor(base, dtype=torch.float64),
        calibration=known,
    )


def random_group(
    shape: tuple[int, ...] = (5, 4),
    *,
    samples: int = 9,
    experts: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[TensorGroup, list[Tensor]]:
    """Return a group [O, I] and the inputs [samples, I] of its experts' layers."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    base = drawn(*shape).to(dtype)
    moved = tuple(base + 0.1 * drawn(*shape).to(dtype) for _ in range(experts))
    inputs = [drawn(samples, shape[1]) * (1 + drawn(shape[1]).abs()) for _ in range(experts)]
    grams = torch.stack([x.T @ x for x in inputs])[:, None]
    known = {
        "gram": grams,
        "gram_rows": torch.full((experts,), float(samples), dtype=torch.float64),
        "gram_along": torch.tensor(1),
    }
    return TensorGroup(
        "w", moved, torch.ones(experts, dtype=dtype), base, calibration=known
    ), inputs
