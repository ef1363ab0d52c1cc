"""Regress each linear layer on what the experts' layers give for their own inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from mergewell.component import Probability
from mergewell.gram import GramMerge, Inputs, anchored, averaged
from mergewell.methods.base import TensorGroup


class RegMean(GramMerge):
    """Regress each linear layer on what the experts' layers give for their own inputs.

    W = (sum_k c_k W_k G_k) (sum_k c_k G_k)^-1, with the Gram matrix G_k of the inputs of expert k's
    layer, whose entries off the diagonal count `alpha` times. Embeddings, norms and biases are
    averaged. Needs `calibration: FILE` in the recipe, made with `mergewell calibrate --gram`.

    Paper: Jin et al. 2023, "Dataless knowledge fusion by merging weights of language models",
    arXiv:2212.09849, equation 2 and algorithm 1.
    Departures: convolutions are merged too, as maps of their patches. Gram matrices are means over
    an expert's inputs, so that the number of them does not count, but the coefficients c_k do.
    Directions that no input has stay at the average, where the paper inverts what rounding left.
    """

    paper: ClassVar[str] = "arXiv:2212.09849"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"alpha": (0.1, 0.5, 0.9, 1.0)}

    alpha: Probability = 0.9
    """Factor of the Gram matrices off their diagonal; 0.1 in the paper for some small models."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the weight nearest to all experts' on their own inputs."""
        inputs = Inputs.of(group)
        if inputs is None:
            return averaged(group)
        return anchored(group, averaged(group), inputs.shrunk(self.alpha))
