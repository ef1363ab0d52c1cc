"""Merge low-rank experts in the small space that their own directions span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergewell.linalg import Factors
from mergewell.low_rank import LowRankMerge, span
from mergewell.methods.base import Laws


class CoreSpace(LowRankMerge):
    """Merge low-rank experts in the small space that their own directions span.

    U spans the outputs of all B_k, V the inputs of all A_k, where theta_k - theta_0 = B_k A_k; the
    cores U' B_k A_k V, no larger than the ranks' sum, are merged by `of` and Delta = U core V'.
    Nothing is lost: a linear `of` gives what it gives without. Experts need not be adapters, but of
    full rank the cores are only the matrices turned.

    Paper: Panariello et al. 2025, "Accurate and efficient low-rank model merging in core space",
    arXiv:2509.17786, section 4.
    Departures: B and A are taken from the singular value decomposition of each task matrix,
    B = P sqrt(S) and A = sqrt(S) Q', where the paper takes the adapter's own, whose split is
    arbitrary; it decides how U and V are turned, so only methods that are not linear see it.
    """

    paper: ClassVar[str] = "arXiv:2509.17786"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale": (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.4)
    }
    laws: ClassVar[Laws] = Laws(neutral={"of": {"name": "task_arithmetic", "divide": "count",
                                                "scale": 1.0}, "scale": 1.0})  # fmt: skip

    def axes(self, factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
        """Return the directions of all experts' outputs and of all their inputs."""
        left = [each.left * each.values.sqrt() for each in factors]
        right = [each.right * each.values.sqrt() for each in factors]
        return span(torch.cat(left, dim=1)), span(torch.cat(right, dim=1))
