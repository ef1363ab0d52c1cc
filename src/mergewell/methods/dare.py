"""Drop task-vector entries at random, rescale the rest, add or elect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Fractions, Laws, for_each, MergeMethod, Needs, TensorGroup
from mergewell.statistics.kept_norm import KeptNorm


class Dare(MergeMethod):
    """Drop task-vector entries at random, rescale the rest, and add or elect.

    Paper: Yu et al. 2024, "Language models are super Mario", arXiv:2311.03099, section 3.
    Departures: `density` is the fraction kept, 1 - p in the paper. The masks depend on the seed,
    the tensor's name, the expert's place and the entry's position alone, so they are the same for
    every run, block size and number of threads.
    """

    paper: ClassVar[str] = "arXiv:2311.03099"
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(
        order_free="each expert's mask is drawn by its place in the recipe.",
        neutral={"density": 1.0, "scale": 1.0, "combine": "agreeing"},
    )

    density: Fractions = 0.5
    """Probability with which each entry of a task vector is kept; one, or one an expert."""

    rescale: Literal["density", "norm", "none"] = "density"
    """Divide what is kept by the density (paper), restore its L1 norm (mergekit), or neither."""

    combine: Literal["sum", "agreeing"] = "agreeing"
    """Add the task vectors up, or elect signs and average those that agree (DARE-TIES)."""

    scale: float = 1.0
    """Factor on the merged task vector."""

    def statistics(self) -> Sequence[KeptNorm]:
        """Return the norms that `rescale="norm"` restores."""
        return (KeptNorm(density=self.density),) if self.rescale == "norm" else ()

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled combination of the thinned task vectors."""
        kept = [self._thin(group, expert) for expert in range(len(group.experts))]
        if self.combine == "sum":
            merged = ops.weighted_sum(group.coefficients, kept)
        else:
            merged = ops.combine_agreeing(group, kept, ops.elect_sign(kept, "mass"), "count")
        return group.required_base + self.scale * merged

    def _thin(self, group: TensorGroup, expert: int) -> Tensor:
        tau = group.task_vectors[expert]
        density = for_each(self.density, len(group.experts))[expert]
        if density < 1.0:
            tau = torch.where(group.uniform(expert) < density, tau, 0.0)
        if self.rescale == "density":
            return tau / density
        if self.rescale == "none":
            return tau
        norms = group.statistic(self.statistics()[0])
        whole, kept = norms["whole"][expert], norms["kept"][expert]
        return tau * torch.where(kept == 0, 1.0, whole / kept).to(tau.dtype)
