"""Let changes compete: weigh each by its size and its agreement, drop those that lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergewell.methods.base import Fraction, Laws, MergeMethod, Needs, TensorGroup
from mergewell.statistics.competition import CompetitionThresholds, clamped, competition


class Pcb(MergeMethod):
    """Let changes compete: weigh each by its size and its agreement, drop those that lose.

    theta = theta_0 + scale sum_k w_k c_k tau_k / sum_k w_k, entry by entry.

    Score: exp(K m^2) tanh(tau_k sum tau), m the magnitude scaled to [0, 1] between its limits.
    The scores above the quantile 1 - density, scaled to [0, 1], weigh the changes.

    Paper: Du et al. 2024, "Parameter Competition Balancing", arXiv:2410.02396, section 3.2.
    Departures: as the authors' code, which clamps magnitudes at the quantiles 0.0001 and 0.9999;
    thresholds are exact but rounded to float32. Coefficients multiply the changes and do not
    count in their competition. The authors' search for coefficients is no part of it.
    """

    paper: ClassVar[str] = "arXiv:2410.02396"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "density": (0.05, 0.1, 0.2, 0.4),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(
        single_expert="extreme changes are clamped and most are dropped.",
        equal_experts="extreme changes are clamped and most are dropped.",
        scale="the hyperbolic tangent is not homogeneous.",
    )

    density: Fraction = 0.1
    """Fraction of each expert's changes that win; 0.05 to 0.1 in the paper."""

    clamp: Annotated[float, Field(ge=0, lt=0.5)] = 1e-4
    """Fraction of the magnitudes that is clamped at either end."""

    scale: float = 1.2
    """Factor on the merged task vector."""

    scope: Literal["model", "tensor"] = "model"
    """Compete over the whole model (paper), or in each tensor."""

    def statistics(self) -> Sequence[CompetitionThresholds]:
        """Return the limits of the magnitudes and of the scores."""
        return (CompetitionThresholds(density=self.density, clamp=self.clamp, scope=self.scope),)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the mean of the winning changes, weighed by their scores."""
        value = group.statistic(self.statistics()[0])
        limits, bounds = value["limits"], value["scores"].to(group.experts[0].dtype)
        scores, sizes = competition(group, limits), clamped(group, limits)
        summed = torch.zeros_like(group.required_base)
        divisor = torch.zeros_like(summed)
        for k, (tau, size) in enumerate(zip(group.task_vectors, sizes, strict=True)):
            low, high = bounds[k]
            width = torch.where(high > low, high - low, 1.0)
            weight = (scores[k].clamp(min=low, max=high) - low) / width
            summed = summed + group.coefficients[k] * (weight * (tau.sign() * size))
            divisor = divisor + weight
        return group.required_base + self.scale * (summed / divisor.clamp(min=1e-12))
