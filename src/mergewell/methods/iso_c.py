"""Give all directions of the summed task matrix the same length (Iso-C)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mergewell.matrices import SpectralMerge, TaskMatrices
from mergewell.methods.base import Laws, Probability


class IsoC(SpectralMerge):
    """Give all directions of the summed task matrix the same length (Iso-C).

    sum_k c_k (theta_k - theta_0) = U S V'; Delta = mean(S) U V'.

    Paper: Marczak et al. 2025, "No task left behind", arXiv:2502.04959, section 4.1, algorithm 1.
    Departures: directions that the sum does not have keep their length 0 and do not count in the
    mean; a full SVD lifts arbitrary ones where the sum is short of rank, as with LoRA. `scale` is
    given, not tuned on validation data; 1 to 1.5 suits many experts.
    """

    paper: ClassVar[str] = "arXiv:2502.04959"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6)
    }
    laws: ClassVar[Laws] = Laws(
        single_expert="The spectrum is flattened, that of a single expert too.",
        equal_experts="The spectrum is flattened, and K equal experts add up to K times one.",
    )

    isotropy: Probability = 1.0
    """How far each length is moved towards their mean; 0 leaves the plain sum."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the sum with its singular values moved to their mean."""
        factors = self.factors(matrices.total())
        if not len(factors.values):
            return factors.matrix()
        mean = factors.values.mean()
        return factors.matrix(factors.values + self.isotropy * (mean - factors.values))
