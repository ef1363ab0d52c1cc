"""Select where experts differ, weigh them by how much they changed there, erase the minority."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Fraction, Laws, MergeMethod, Needs, TensorGroup
from mergewell.statistics.selected_energy import SelectedEnergy


class Sce(MergeMethod):
    """Select where experts differ, weigh them by how much they changed, erase minority signs.

    theta = theta_0 + scale mean_k(w_k tau_k) over those that agree, w_k = E_k / sum_j E_j.

    Of the entries that vary, the floor(density * number) with the largest variance over the
    experts are kept; an expert's weight is the mean square of its kept changes.

    Paper: Wan et al. 2024, "FuseChat", arXiv:2408.07990, section 3.2 (select, calculate, erase).
    Departures: equal variances from the front of the tensor, exactly as many as asked for;
    coefficients multiply the weights; where nobody agrees the base stays.
    mergekit's sce: density for select_topk, least=1e-6: where the mean squares of all experts
    together stay below it, as in most fine-tunes of bf16 models, mergekit weighs all the same.
    """

    paper: ClassVar[str] = "arXiv:2408.07990"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "density": (0.1, 0.3, 0.6, 1.0),
        "scale": (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.4),
    }
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(neutral={"density": 1.0, "scale": 1.0})

    density: Fraction = 1.0
    """Fraction of the varying entries kept; 1 keeps all entries."""

    least: Annotated[float, Field(ge=0)] = 0.0
    """Sum of the experts' mean squares below which all weigh the same; mergekit has 1e-6."""

    scale: float = 1.0
    """Factor on the merged task vector."""

    def statistics(self) -> Sequence[SelectedEnergy]:
        """Return the threshold of the variances and the experts' mean squares above it."""
        return (SelectedEnergy(density=self.density),)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the weighted mean of the kept changes that agree."""
        (statistic,) = self.statistics()
        value = group.statistic(statistic)
        mask = statistic.mask(group, value)
        kept = list(group.task_vectors)
        if mask is not None:
            kept = [torch.where(mask, tau, 0.0) for tau in kept]
        weights = self.weights(value["energy"]).to(kept[0].dtype)
        weighed = replace(group, coefficients=group.coefficients * weights)
        elected = ops.elect_sign(kept, "mass")
        merged = ops.combine_agreeing(weighed, kept, elected, "coefficients")
        return group.required_base + self.scale * merged

    def weights(self, energy: Tensor) -> Tensor:
        """Return each expert's share of the mean squares [K]; equal ones below `least`."""
        whole = energy.sum()
        if float(whole) > 0 and float(whole) >= self.least:
            return energy / whole
        return torch.ones_like(energy) / len(energy)
