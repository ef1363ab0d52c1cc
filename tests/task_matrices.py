"""Small groups of task vectors about a base of 10 everywhere, and drawn matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from mergewell.tensor_group import TensorGroup


def group(*task_vectors: object, coefficients: list[float] | None = None) -> TensorGroup:
    """Return a group of experts that are 10 plus these task vectors, in float64."""
    taus = [torch.as_tensor(tau, dtype=torch.float64) for tau in task_vectors]
    base = torch.full_like(taus[0], 10.0)
    weights = torch.tensor(coefficients or [1.0] * len(taus), dtype=torch.float64)
    return TensorGroup("layer.weight", tuple(base + tau for tau in taus), weights, base)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Return normal random numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
