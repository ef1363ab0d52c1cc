"""Drop task-vector entries at random, small ones more often, rescale the rest, add or elect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Fractions, Laws, Needs, TensorGroup, for_each
from mergewell.statistics.kept_norm import Favour, KeptNorm

Epsilon = Annotated[float, Field(ge=0, lt=0.5)]


class Della(ops.SparseMerge):
    """Drop task-vector entries at random, small ones more often; rescale, add or elect.

    theta = theta_0 + scale combine_k(c_k m_k tau_k / p_k), m_k = 1 with probability p_k.

    In each row the probability to be kept rises with the magnitude's rank, linearly, from
    density - epsilon for the smallest to density + epsilon for the largest.

    Paper: Deep et al. 2024, "DELLA-Merging", arXiv:2406.11617, section 3 (MagPrune).
    Departures: a row is an output unit with all its inputs; both codes rank a 4-d kernel along
    dimension 1 instead. Equal magnitudes are ranked by position; a row of one entry is kept with
    `density`. Ranks over a whole tensor, which the authors' code also offers, are not: they would
    need a sort of it. Masks depend on seed, name, expert and position alone.
    mergekit's della and della_linear: combine="agreeing" or "sum", epsilon=0.15, rescale="norm",
    votes="weighted", divide="coefficients" (normalize: true) or "none", scale for lambda.
    """

    paper: ClassVar[str] = "arXiv:2406.11617"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "density": (0.2, 0.5, 0.8),
        "epsilon": (0.05, 0.15),
        "scale": (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.4),
    }
    needs: ClassVar[Needs] = Needs(base=True, granularity="row")
    laws: ClassVar[Laws] = Laws(
        order_free="each expert's mask is drawn by its place in the recipe.",
        neutral={**ops.NEUTRAL_SPARSE, "elect": "mass"},
    )

    density: Fractions = 0.5
    """Mean probability with which an entry is kept; one, or one an expert. 1 keeps everything."""

    epsilon: Epsilon | tuple[Epsilon, ...] = 0.05
    """Half the range of the probability along a row; density -/+ epsilon must lie in (0, 1)."""

    favour: Favour = "rank"
    """Let the probability rise with the rank by magnitude (paper), or the magnitude itself."""

    rescale: Literal["probability", "norm", "none"] = "probability"
    """Divide what is kept by its probability (paper), restore its L1 norm (mergekit), or not."""

    @model_validator(mode="after")
    def _probabilities_in_bounds(self) -> Self:
        given = [v for v in (self.density, self.epsilon) if isinstance(v, tuple)]
        count = len(given[0]) if given else 1
        pairs = zip(for_each(self.density, count), for_each(self.epsilon, count), strict=True)
        for density, epsilon in pairs:
            if density < 1 and not epsilon < density < 1 - epsilon:
                raise ValueError(
                    f"density {density} -/+ epsilon {epsilon} leaves (0, 1); lower epsilon"
                )
        return self

    def statistics(self) -> Sequence[KeptNorm]:
        """Return the norms that `rescale="norm"` restores."""
        return (self._kept(),) if self.rescale == "norm" else ()

    def thin(self, group: TensorGroup) -> list[Tensor]:
        """Return the task vectors with entries dropped at random, the rest rescaled."""
        kept: list[Tensor] = []
        densities = for_each(self.density, len(group.experts))
        for expert, (tau, density) in enumerate(zip(group.task_vectors, densities, strict=True)):
            probability = self._kept().probability(group, expert, density)
            if density < 1.0:
                tau = torch.where(group.uniform(expert) < probability, tau, 0.0)
            kept.append(tau / probability if self.rescale == "probability" else tau)
        if self.rescale != "norm":
            return kept
        return ops.restore_norms(kept, group.statistic(self._kept()))

    def _kept(self) -> KeptNorm:
        return KeptNorm(density=self.density, spread=self.epsilon, favour=self.favour)
