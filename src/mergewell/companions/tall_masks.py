"""Masks of the entries that matter to an expert beside the others' sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergewell.companions.base import Cut, MaskCompanion, absolute
from mergewell.component import for_each

Threshold = Annotated[float, Field(ge=0)]


class TallMasks(MaskCompanion):
    """Keep the entries of the multi-task vector that are large beside the other experts' part.

    mask_k = 1[|tau_k| >= threshold_k |tau - tau_k|], tau the sum of the task vectors; the expert is
    base + mask_k * tau.

    Paper: Wang et al. 2024, "Localizing task information", arXiv:2405.07813, section 4 (TALL
    masks). Departures: thresholds are given, not tuned on validation data. Task vectors are times
    their coefficients, and of a TIES merge tau is what the merge adds to the base; the rescaler
    undoes the `scale` of task arithmetic and the expert's coefficient, and is 1 without them.
    """

    paper: ClassVar[str] = "arXiv:2405.07813"
    methods: ClassVar[tuple[str, ...]] = ("task_arithmetic", "ties")

    threshold: Threshold | tuple[Threshold, ...] = 0.4
    """How large a change must be against the others' sum; one, or one an expert (0.2 to 0.6)."""

    def cut(
        self,
        task_vectors: Sequence[Tensor],
        coefficients: Sequence[float],
        unified: Tensor,
        *,
        method: str,
    ) -> Cut:
        """Return the masks, and the magnitudes of what they keep of tau and of the file's."""
        taus = [c * tau for c, tau in zip(coefficients, task_vectors, strict=True)]
        whole = torch.stack(taus).sum(0) if method == "task_arithmetic" else unified
        thresholds = for_each(self.threshold, len(taus))
        masks = tuple(
            tau.abs() >= threshold * (whole - tau).abs()
            for tau, threshold in zip(taus, thresholds, strict=True)
        )
        sizes = zip(coefficients, masks, strict=True)
        return Cut(
            masks,
            tuple(absolute(whole * mask) / c for c, mask in sizes),
            tuple(absolute(unified * mask) for mask in masks),
        )
