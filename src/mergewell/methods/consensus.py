"""Keep the entries of the summed task vector that matter to several experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup, for_each

Threshold = Annotated[float, Field(ge=0)]


class Consensus(MergeMethod):
    """Keep the entries of the summed task vector that matter to several experts (TALL masks).

    An entry matters to expert k where |tau_k| >= threshold_k |sum tau - tau_k|; it is kept where
    it matters to `minimum` experts at least, so that selfish and idle entries go.

    Paper: Wang et al. 2024, "Localizing task information", arXiv:2405.07813, sections 4 and 5.
    Departures: thresholds are given, not tuned on validation data; the masks of single experts
    (TALL compression) are companions of a merge and not made here. Coefficients multiply the task
    vectors before all else.
    """

    paper: ClassVar[str] = "arXiv:2405.07813"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "threshold": (0.2, 0.4, 0.6),
        "minimum": (1, 2, 3),
        "scale": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0),
    }
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(
        equal_experts="K equal task vectors add up to K times one; coefficients 1/K average them.",
        neutral={"minimum": 1, "scale": 1.0},
    )

    threshold: Threshold | tuple[Threshold, ...] = 0.4
    """How large a change must be against the others' sum; one, or one an expert (0.2 to 0.6)."""

    minimum: Annotated[int, Field(ge=1)] = 2
    """To how many experts an entry must matter."""

    scale: float = 0.3
    """Factor on what is kept of the sum."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus what is kept of the sum."""
        taus = [c * tau for c, tau in zip(group.coefficients, group.task_vectors, strict=True)]
        summed = ops.total(taus)
        thresholds = for_each(self.threshold, len(taus))
        count = torch.zeros_like(summed, dtype=torch.int32)
        for tau, threshold in zip(taus, thresholds, strict=True):
            count = count + (tau.abs() >= threshold * (summed - tau).abs())
        kept = torch.where(count >= self.minimum, summed, 0.0)
        return group.required_base + self.scale * kept

    def objection(self, coefficients: Sequence[float]) -> str:
        """Refuse fewer experts than have to agree: nothing would be kept."""
        if len(coefficients) < self.minimum:
            return f"{len(coefficients)} experts cannot reach minimum = {self.minimum}; lower it"
        return ""
