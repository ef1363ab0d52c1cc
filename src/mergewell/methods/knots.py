"""Merge low-rank experts after turning them to one set of output directions (KnOTS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergewell.linalg import Factors
from mergewell.low_rank import LowRankMerge, span
from mergewell.methods.base import Laws


class Knots(LowRankMerge):
    """Merge low-rank experts after turning them to one set of output directions (KnOTS).

    [tau_1 .. tau_K] = U S [V_1 .. V_K]'; the S V_k' are merged by `of`, and Delta = U times that.

    Paper: Stoica et al. 2025, "Model merging with SVD to tie the knots", arXiv:2410.19735,
    section 4.
    Departures: directions below 1e-6 of the longest are left out, where the code cuts at 1e-5 in
    units of the weights. U comes from the experts' own factors, which gives the same.
    """

    paper: ClassVar[str] = "arXiv:2410.19735"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale": (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.4)
    }
    laws: ClassVar[Laws] = Laws(neutral={"of": {"name": "task_arithmetic", "divide": "count",
                                                "scale": 1.0}, "scale": 1.0})  # fmt: skip

    def axes(self, factors: Sequence[Factors]) -> tuple[Tensor, None]:
        """Return the directions of all experts' outputs; inputs stay as they are."""
        return span(torch.cat([each.left * each.values for each in factors], dim=1)), None
