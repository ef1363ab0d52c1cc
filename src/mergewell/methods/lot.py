"""Find the task vector that drifts least from what each expert makes of its own inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from mergewell.gram import GramMerge, Inputs, anchored, averaged
from mergewell.methods.base import Laws, Needs, TensorGroup, needs_by


class Lot(GramMerge):
    """Find the task vector that drifts least from what each expert makes of its own inputs.

    theta = theta_0 + scale * T with T = (sum_k T_k G_k)(sum_k G_k)^+ for linear layers, where G_k
    is the Gram matrix of expert k's inputs; for scales of norms the same, each number by itself:
    T[d] = sum_k T_k[d] x_k[d]^2 / sum_k x_k[d]^2; the mean of the T_k for all else. Needs a
    calibration made with `mergewell calibrate --gram`.

    Paper: "LOT Merging", NeurIPS 2025, arXiv:2505.23859.
    Departures: Gram matrices are means over an expert's inputs, so that the number of them does not
    count, but coefficients do. Convolutions are linear maps of their patches.
    """

    paper: ClassVar[str] = "arXiv:2505.23859"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "cutoff": (1e-06, 0.001, 0.01),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    needs: ClassVar[Needs] = needs_by(
        lambda method: (
            Needs(base=True, granularity="matrix", calibration=("gram",))
            if method.guided
            else Needs(base=True)
        )
    )
    laws: ClassVar[Laws] = Laws(neutral={"scale": 1.0})

    scale: float = 1.2
    """Factor on the merged task vector; 1.2 to 1.5 in the paper, flat from 1 on."""

    cutoff: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """Directions whose mean square is below this fraction of the largest are taken as unseen: there
    the merged model stays at the base."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled task vector."""
        inputs = Inputs.of(group, norms=True)
        if inputs is None:
            best = averaged(group)
        else:
            best = anchored(group, group.required_base, inputs, cutoff=self.cutoff)
        if self.scale == 1.0:
            return best
        return group.required_base + self.scale * (best - group.required_base)
