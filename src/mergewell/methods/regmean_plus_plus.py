"""Regress each layer on the experts' outputs for what the layers merged before it give."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mergewell.component import Probability
from mergewell.gram import GramMerge, Inputs, anchored, averaged
from mergewell.methods.base import Needs, TensorGroup, needs_by


class RegMeanPlusPlus(GramMerge):
    """Regress each layer on the experts' outputs for what the layers merged before it give.

    RegMean, W = (sum_k c_k W_k G_k)(sum_k c_k G_k)^-1, but G_k is of what expert k's layer is given
    in a network whose blocks before it are merged already, so that errors do not add up with depth.
    Needs a calibration made with `mergewell calibrate --method regmean_plus_plus` at the same
    settings, which merges block by block as it goes.

    Paper: Nguyen et al. 2025, "RegMean++", arXiv:2508.03121, algorithm 1.
    Departures: those of `regmean`. Layers outside the blocks (a stem, a head) are taken one by one.
    """

    paper: ClassVar[str] = "arXiv:2508.03121"
    needs: ClassVar[Needs] = needs_by(
        lambda method: (
            Needs(granularity="matrix", calibration=("gram_forward",)) if method.guided else Needs()
        )
    )

    alpha: Probability = 0.95
    """Factor of the Gram matrices off their diagonal."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the weight nearest to all experts' on what merged layers give."""
        inputs = Inputs.of(group)
        if inputs is None:
            return averaged(group)
        return anchored(group, averaged(group), inputs.shrunk(self.alpha))
