"""Weigh experts in each layer by how rich and peaceful their changes are, then merge (LARV)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mergewell.matrices import RefinedMerge, TaskMatrices
from mergewell.methods.base import Laws, TensorGroup
from mergewell.statistics.base import WeightStatistic
from mergewell.statistics.depth import LAYER_PATTERN
from mergewell.statistics.layer_contrast import LayerContrast

_TIERS = (0.5, 0.75, 1.0)


class Larv(RefinedMerge):
    """Weigh experts layer by layer by how rich and peaceful their changes are (LARV).

    Expert k in matrix l has the score s = e^contrast_power d^depth_power / (1 + softplus(c)): e the
    base's effective rank over the task matrix', d the depth in (0, 1], c its conflict with the base
    as a z-score over all matrices. A gate made of s multiplies its coefficient, and `of` merges.

    Paper: Wang et al. 2026, "LARV", arXiv:2602.09413, equation 8 (in another's implementation).
    Departures: the paper's gates by tier were not found; 0.5, 0.75 and 1 for the lower, middle and
    upper third of an expert's scores are that implementation's. The gate multiplies coefficients,
    not task vectors, so that `of` still finds its thresholds; `of` must not divide by them. It
    holds for matrices; vectors, embeddings and heads keep their coefficients.
    """

    paper: ClassVar[str] = "arXiv:2602.09413"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "of": ({"name": "task_arithmetic", "scale": 0.3}, {"name": "iso_c"}),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws()

    gate: Literal["tiers", "smooth"] = "tiers"
    """Three steps by the third a score lies in, or 1 + tanh(steepness (s - 1)) / 2."""

    contrast_power: float = 1.0
    """Power of the effective-rank contrast (eta)."""

    depth_power: float = 0.5
    """Power of the depth (rho)."""

    steepness: float = 3.0
    """smooth: how fast the gate opens (gamma)."""

    layer_pattern: str = LAYER_PATTERN
    """Regular expression for tensor names; its first group is the layer's number, from 0."""

    def statistics(self) -> Sequence[WeightStatistic]:
        """Return the contrast and conflict of all matrices, and what `of` needs."""
        return (LayerContrast(pattern=self.layer_pattern), *self.of.statistics())

    def merge(self, group: TensorGroup) -> Tensor:
        """Return what `of` makes of the gated coefficients, its change times scale."""
        gates = self.gates(group).to(group.coefficients)
        merged = self.of.merge(replace(group, coefficients=gates * group.coefficients))
        return group.required_base + self.scale * (merged - group.required_base)

    def refine(self, merged: Tensor, matrices: TaskMatrices) -> Tensor:
        """Return the merged task matrix as it is."""
        del matrices
        return merged

    def gates(self, group: TensorGroup) -> Tensor:
        """Return each expert's gate in this tensor, [K], float64."""
        value = group.statistic(LayerContrast(pattern=self.layer_pattern))
        row = int(value["row"])
        if row < 0:
            return torch.ones(len(group.experts), dtype=torch.float64)
        conflict, depth = value["conflict"], value["depth"][:, None]
        spread = conflict.std(0, correction=0)
        centred = (conflict - conflict.mean(0)) / torch.where(spread > 0, spread, 1.0)
        scores = value["contrast"] ** self.contrast_power * depth**self.depth_power
        scores = scores / (1 + functional.softplus(centred))
        if self.gate == "smooth":
            return 1 + 0.5 * torch.tanh(self.steepness * (scores[row] - 1))
        tier = 3 * (scores < scores[row]).sum(0) // len(scores)
        return torch.where(tier == 0, _TIERS[0], torch.where(tier == 1, _TIERS[1], _TIERS[2]))
