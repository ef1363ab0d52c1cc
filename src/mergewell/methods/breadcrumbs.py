"""Drop the largest and the smallest task-vector entries, add the rest or elect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Fractions, Laws, Needs, TensorGroup, for_each, needs_by
from mergewell.statistics.magnitude import MagnitudeNorms, MagnitudeThreshold, kept_count
from mergewell.statistics.ops import rows_of

Gamma = Annotated[float, Field(ge=0, lt=1)]


def _needs(method: Breadcrumbs) -> Needs:
    return Needs(base=True, granularity="row" if method.trim_scope == "row" else "element")


class Breadcrumbs(ops.SparseMerge):
    """Drop the largest and the smallest task-vector entries, add the rest or elect.

    theta = theta_0 + scale combine_k(c_k m_k tau_k), m_k a mask on the magnitudes of tau_k.

    Of n entries the floor(gamma n) largest go, then all but the next floor(density n).

    Paper: Davari and Belilovsky 2024, "Model Breadcrumbs", arXiv:2312.06795, section 3.
    Departures: fewer large entries go where density n would not be left; gamma 0 removes none
    (in mergekit 0.1.4 it removed everything). Equal magnitudes are taken from the front, exactly
    as many as asked for. The authors' code works on rows (`trim_scope="row"`) and takes its kept
    fraction of what gamma leaves; it uses gamma 0.1, scale 0.4 and keeps 0.2.
    mergekit's breadcrumbs and breadcrumbs_ties: combine="sum" or "agreeing", gamma=0.01,
    votes="weighted", divide="none" ("coefficients" for normalize: true), scale for lambda,
    rescale="norm" for rescale: true (trim_scope="tensor").
    """

    paper: ClassVar[str] = "arXiv:2312.06795"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "density": (0.2, 0.5, 0.9),
        "gamma": (0.005, 0.01, 0.05),
        "scale": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0),
    }
    needs: ClassVar[Needs] = needs_by(_needs)
    laws: ClassVar[Laws] = Laws(neutral={**ops.NEUTRAL_SPARSE, "elect": "mass", "gamma": 0.0})

    combine: Literal["sum", "agreeing"] = "sum"
    """Add the task vectors up (paper), or elect a sign for each entry and average what agrees."""

    density: Fractions = 0.2
    """Fraction of each task vector kept; one, or one an expert. 1 keeps everything."""

    gamma: Gamma | tuple[Gamma, ...] = 0.01
    """Fraction of each task vector dropped as outliers, the largest; one, or one an expert."""

    trim_scope: Literal["tensor", "row"] = "tensor"
    """Count entries in each tensor (mergekit), or in each row (the authors' code)."""

    rescale: Literal["none", "norm"] = "none"
    """Leave what is kept as it is (paper), or restore each task vector's L1 norm (tensor only)."""

    @model_validator(mode="after")
    def _norms_are_of_tensors(self) -> Self:
        if self.rescale == "norm" and self.trim_scope == "row":
            raise ValueError("rescale 'norm' goes with trim_scope 'tensor' only; choose that")
        return self

    def statistics(self) -> Sequence[MagnitudeThreshold]:
        """Return the exact thresholds, where they are of whole tensors."""
        if self.density == 1.0 or self.trim_scope == "row":
            return ()
        kind = MagnitudeNorms if self.rescale == "norm" else MagnitudeThreshold
        return (kind(density=self.density, outliers=self.gamma),)

    def thin(self, group: TensorGroup) -> list[Tensor]:
        """Return the task vectors with the largest and the smallest entries set to zero."""
        if self.density == 1.0:
            return list(group.task_vectors)
        if self.trim_scope == "tensor":
            (threshold,) = self.statistics()
            kept = ops.trim(group, threshold)
            if self.rescale == "none":
                return kept
            return ops.restore_norms(kept, group.statistic(threshold))
        experts = len(group.experts)
        settings = zip(for_each(self.density, experts), for_each(self.gamma, experts), strict=True)
        return [
            _middle_of_rows(tau, density, gamma)
            for tau, (density, gamma) in zip(group.task_vectors, settings, strict=True)
        ]


def _middle_of_rows(tau: Tensor, density: float, gamma: float) -> Tensor:
    rows = rows_of(tau)
    length = rows.shape[1]
    kept = kept_count(density, length)
    passed = min(int(gamma * length + 1e-9), length - kept)
    rank = ops.ranks_in_rows(rows)
    mask = (rank >= passed) & (rank < passed + kept)
    return torch.where(mask, rows, 0.0).reshape(tau.shape)
