"""Raise the short directions of another method's result to the length of a longer one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergewell.matrices import RefinedMerge, TaskMatrices
from mergewell.methods.base import Laws, Probability


class SubspaceBoosting(RefinedMerge):
    """Raise the short directions of another method's result to the length of a longer one.

    theta = theta_0 + scale U max(S, s_beta) V'.

    The result of `of`, less the base, is U S V'. The first singular value at which the running sum
    reaches the share `beta` of the whole sum is the least that any direction gets.

    Paper: Skorobogat et al. 2025, "Subspace-boosted model merging", arXiv:2506.16506, section 4.
    Departures: directions that the result does not have stay at 0. Fused queries, keys and values
    are taken apart where a rule sets `parts`. What is no matrix stays as `of` gives it.
    """

    paper: ClassVar[str] = "arXiv:2506.16506"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "beta": (0.0, 0.01, 0.05),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws(
        equal_experts="K equal task vectors add up to K times one; coefficients 1/K average them.",
        neutral={"beta": 1.0, "of": {"name": "task_arithmetic", "scale": 1.0}},
    )

    beta: Probability = 0.01
    """Share of the sum of singular values at which the least length is read; 1 changes nothing."""

    def refine(self, merged: Tensor, matrices: TaskMatrices) -> Tensor:
        """Return the merged task matrix with its short directions raised."""
        del matrices
        factors = self.factors(merged)
        if not len(factors.values):
            return merged
        held = factors.values.to(torch.float64).cumsum(0)
        cutoff = int((held < self.beta * held[-1] * (1 - 1e-9)).sum())
        return factors.matrix(factors.values.clamp(min=float(factors.values[cutoff])))
