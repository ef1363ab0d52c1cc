"""Localize each expert's largest changes and average them where they meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Fractions, Laws, MergeMethod, Needs, TensorGroup
from mergewell.statistics.magnitude import MagnitudeThreshold


class LocalizeAndStitch(MergeMethod):
    """Localize each expert's largest changes and average them where they meet.

    theta = theta_0 + sum_k c_k tau_k m_k / sum_j m_j, m_k the mask of the largest changes.

    Paper: He et al. 2024, "Localize-and-Stitch", arXiv:2408.13656, sections 3 and 4 (dataless).
    Departures: masks by magnitude alone, the paper's dataless form, not learned from data; exactly
    floor(density * size) entries, ties from the front.
    """

    paper: ClassVar[str] = "arXiv:2408.13656"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "density": (0.01, 0.05, 0.1, 0.2, 0.5),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(neutral={"density": 1.0, "scale": 1.0, "trim_scope": "tensor"})

    density: Fractions = 0.05
    """Fraction of each task vector kept: 0.05 for language, 0.1 for vision in the paper."""

    trim_scope: Literal["model", "tensor"] = "model"
    """Keep the largest changes of the whole model (paper), or of each tensor."""

    scale: float = 1.0
    """Factor on the merged task vector."""

    def statistics(self) -> Sequence[MagnitudeThreshold]:
        """Return the exact threshold of the magnitudes; at density 1 everything is kept."""
        if self.density == 1.0:
            return ()
        return (MagnitudeThreshold(density=self.density, scope=self.trim_scope),)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the stitched changes."""
        taus = group.task_vectors
        masks = [torch.ones_like(tau) for tau in taus]
        for threshold in self.statistics():
            masks = [ops.largest(group, k, threshold).to(tau.dtype) for k, tau in enumerate(taus)]
        kept = [tau * mask for tau, mask in zip(taus, masks, strict=True)]
        summed = ops.weighted_sum(group.coefficients, kept)
        return group.required_base + self.scale * ops.divided(summed, ops.total(masks))
