"""Iso-C with some of the directions given to what is each expert's own (Iso-CTS)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergewell import linalg
from mergewell.matrices import SpectralMerge, TaskMatrices
from mergewell.methods.base import Laws, Probability


class IsoCts(SpectralMerge):
    """Iso-C with some of the directions given to what is each expert's own (Iso-CTS).

    theta = theta_0 + scale mean(S) polar(U_common, U_own) polar(V_common, V_own)'.

    The k longest directions U_k of the sum are common. What each task matrix has outside of them,
    M - U_k U_k' M, adds its (r - k) / K longest. All are made orthogonal by their polar factor and
    get one length, the mean of their singular values.

    Paper: Marczak et al. 2025, "No task left behind", arXiv:2502.04959, section 4.2, algorithm 2.
    Departures: k is rounded as in the authors' code, so that r - k divides by K; directions that a
    matrix does not have are left out and do not count in the mean, see `iso_c`. `scale` is given,
    not tuned on validation data; 1 to 1.5 suits many experts.
    """

    paper: ClassVar[str] = "arXiv:2502.04959"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "common": (0.6, 0.8),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws(
        single_expert="The spectrum is flattened, that of a single expert too.",
        equal_experts="The spectrum is flattened, and K equal experts add up to K times one.",
    )

    common: Probability = 0.8
    """Share of the directions that are the sum's; 1 is Iso-C."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return common and own directions, orthogonal and of equal length."""
        count, rank = len(matrices), matrices.rank
        own = min(rank // count, round((rank - int(self.common * rank + 1e-9)) / count))
        shared = self.factors(matrices.total(), rank - own * count)
        found = [shared]
        for k in range(count if own else 0):
            matrix = matrices[k]
            outside = self.factors(matrix - shared.left @ (shared.left.T @ matrix), own)
            # an expert inside the common directions leaves nothing but rounding
            noise = linalg.NOISE * linalg.frobenius(matrix)
            found.append(outside.top(int((outside.values > noise).sum())))
        values = torch.cat([factors.values for factors in found])
        if not len(values):
            return shared.matrix()
        left = self.polar(torch.cat([factors.left for factors in found], dim=1))
        right = self.polar(torch.cat([factors.right for factors in found], dim=1))
        return values.mean() * (left @ right.T)
