"""Drop task-vector entries at random, rescale the rest, add or elect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Fractions, Laws, TensorGroup, for_each
from mergewell.statistics.kept_norm import KeptNorm


class Dare(ops.SparseMerge):
    """Drop task-vector entries at random, rescale the rest, and add or elect.

    theta = theta_0 + scale combine_k(c_k m_k tau_k / p), m_k = 1 with probability p, the density.

    Paper: Yu et al. 2024, "Language models are super Mario", arXiv:2311.03099, section 3.
    Departures: `density` is the fraction kept, 1 - p in the paper. The masks depend on the seed,
    the tensor's name, the expert's place and the entry's position alone, so they are the same for
    every run, block size and number of threads.
    mergekit's dare_linear and dare_ties: combine="sum" or "agreeing", rescale="norm" ("none" for
    rescale: false), votes="weighted", divide="none" ("coefficients" for normalize: true), scale
    for lambda; its masks come from torch's global generator, so parity is in distribution.
    """

    paper: ClassVar[str] = "arXiv:2311.03099"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "density": (0.2, 0.5, 0.8),
        "combine": ("sum", "agreeing"),
        "scale": (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.4),
    }
    laws: ClassVar[Laws] = Laws(
        order_free="each expert's mask is drawn by its place in the recipe.",
        neutral={**ops.NEUTRAL_SPARSE, "elect": "mass"},
    )

    density: Fractions = 0.5
    """Probability with which each entry of a task vector is kept; one, or one an expert."""

    rescale: Literal["density", "norm", "none"] = "density"
    """Divide what is kept by the density (paper), restore its L1 norm (mergekit), or neither."""

    def statistics(self) -> Sequence[KeptNorm]:
        """Return the norms that `rescale="norm"` restores."""
        return (self._kept(),) if self.rescale == "norm" else ()

    def thin(self, group: TensorGroup) -> list[Tensor]:
        """Return the task vectors with entries dropped at random, the rest rescaled."""
        kept: list[Tensor] = []
        densities = for_each(self.density, len(group.experts))
        for expert, (tau, density) in enumerate(zip(group.task_vectors, densities, strict=True)):
            if density < 1.0:
                tau = torch.where(self._kept().keep(group, expert), tau, 0.0)
            kept.append(tau * (1 / density) if self.rescale == "density" else tau)
        if self.rescale != "norm":
            return kept
        return ops.restore_norms(kept, group.statistic(self._kept()))

    def _kept(self) -> KeptNorm:
        return KeptNorm(density=self.density)
