"""Match the experts on their own inputs by a few steps of conjugate gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mergewell.component import Probability
from mergewell.gram import GramMerge, Inputs, anchored, averaged
from mergewell.methods import ops
from mergewell.methods.base import Laws, Needs, TensorGroup, needs_by


class Mats(GramMerge):
    """Match the experts on their own inputs by a few steps of conjugate gradients.

    Solves sum_k c_k W G_k = sum_k c_k W_k G_k from a first merge on, so that few steps stay near it
    in directions that few inputs have, and many give RegMean. Tensors whose inputs are not known
    stay at the first merge. Needs a calibration made with `mergewell calibrate --gram`.

    Paper: Tam, Bansal and Raffel 2024, "Merging by matching models in task parameter subspaces",
    arXiv:2312.04339.
    Departures: Gram matrices of the inputs only, without those of the gradients of the outputs
    (K-FAC's other factor). Every row of a weight takes steps of its own.
    """

    paper: ClassVar[str] = "arXiv:2312.04339"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "alpha": (0.5, 0.9),
        "steps": (50,),
    }
    needs: ClassVar[Needs] = needs_by(
        lambda method: Needs(
            base=method.start == "task_arithmetic",
            granularity="matrix" if method.guided else "element",
            calibration=("gram",) if method.guided else (),
        )
    )
    laws: ClassVar[Laws] = Laws(neutral={"start": "average"})

    start: Literal["average", "task_arithmetic"] = "average"
    """The first merge."""

    scale: float = 0.3
    """Factor on the sum of the task vectors, for task_arithmetic."""

    alpha: Probability = 0.9
    """Factor of the Gram matrices off their diagonal."""

    steps: Annotated[int, Field(ge=1)] = 100
    """Steps of conjugate gradients at most."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the first merge, moved towards what fits all experts' inputs."""
        if self.start == "average":
            first = averaged(group)
        else:
            first = group.required_base + self.scale * ops.total(group.task_vectors)
        inputs = Inputs.of(group)
        if inputs is None:
            return first
        return anchored(group, first, inputs.shrunk(self.alpha), steps=self.steps)
