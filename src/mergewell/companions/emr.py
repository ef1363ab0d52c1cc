"""Masks where an expert agrees with the elected sign, and rescalers that restore its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from mergewell.companions.base import Cut, MaskCompanion, absolute


class Emr(MaskCompanion):
    """Keep the unified entries whose sign is the expert's, rescaled to the expert's size.

    mask_k = 1[tau_k * unified > 0]; r_k = sum |tau_k| / sum |mask_k * unified| over the model.

    Paper: Huang et al. 2024, "EMR-Merging", arXiv:2405.17461, section 3.2 (mask and rescale).
    Departures: `unified` is what the merged file adds to the base, so rounding, and a `scale` of
    the merge, are made up for by the rescaler.
    """

    paper: ClassVar[str] = "arXiv:2405.17461"
    methods: ClassVar[tuple[str, ...]] = ("emr",)

    rescale: Literal["elements", "tensor_means"] = "elements"
    """Sum magnitudes over all elements (paper), or their means over tensors (authors' code)."""

    def cut(
        self,
        task_vectors: Sequence[Tensor],
        coefficients: Sequence[float],
        unified: Tensor,
        *,
        method: str,
    ) -> Cut:
        """Return the masks and the sums of magnitudes."""
        masks = tuple(tau * unified > 0 for tau in task_vectors)
        share = 1 / max(unified.numel(), 1) if self.rescale == "tensor_means" else 1.0
        return Cut(
            masks,
            tuple(share * absolute(tau) for tau in task_vectors),
            tuple(share * absolute(unified * mask) for mask in masks),
        )
