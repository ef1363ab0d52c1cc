"""The toy models and the settings that FusionBench and mergewell are compared on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

EXPERTS = 3
SHAPES: Mapping[str, tuple[int, ...]] = {
    "first.weight": (12, 8), "first.bias": (12,), "norm.weight": (12,), "second.weight": (5, 12),
}  # fmt: skip

CASES: Mapping[str, dict[str, Any]] = {
    "task_arithmetic": {"name": "task_arithmetic", "scale": 0.4},
    "ties": {"name": "ties", "density": 55 / 180, "trim_scope": "model"},
    "magmax": {"name": "magmax", "scale": 0.5},
    "model_stock": {"name": "model_stock"},
    "tsv": {"name": "tsv"},
    "iso_c": {"name": "iso_c", "scale": 1.5},
    "iso_cts": {"name": "iso_cts", "common": 0.5, "scale": 1.5},
    "wudi": {"name": "wudi", "solver": "iterative", "steps": 40},
    "svc": {"name": "svc", "floor": 0.2, "of": {"name": "task_arithmetic", "scale": 0.4}},
    "knots": {"name": "knots", "of": {"name": "ties", "density": 39 / 96}},
    "emr": {"name": "emr"},
    "consensus": {"name": "consensus", "threshold": 0.4, "minimum": 2, "scale": 1.0},
}
"""By the name of the table: our method with its parameters.

Their trimming keeps one number more than the share says (`>=` the largest that goes): 55 of 180 at
0.3, and 39 of 96 at 0.4.
"""


def base() -> dict[str, Tensor]:
    """Return the base's tensors."""
    return drawn(0, 1.0)


def experts() -> list[dict[str, Tensor]]:
    """Return the experts' tensors: what they share, and what each has alone."""
    shared = drawn(1, 0.05)
    own = [drawn(2 + k, 0.1) for k in range(EXPERTS)]
    return [{n: t + shared[n] + each[n] for n, t in base().items()} for each in own]


def drawn(seed: int, size: float) -> dict[str, Tensor]:
    """Return seeded normal tensors in float32."""
    generator = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(s, generator=generator) for n, s in SHAPES.items()}
