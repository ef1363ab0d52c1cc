"""Learn from labels how far each layer goes from the base to the experts (DWiSE-FT)."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from mergewell.descent.learner import CoefficientLearner
from mergewell.descent.merge import Per
from mergewell.descent.steps import Descent
from mergewell.descent.tasks import Aim
from mergewell.recipe import MethodChoice


class DwiseFt(CoefficientLearner):
    """Learn from labels how far each layer goes from the base to the experts (DWiSE-FT).

    theta^l = theta_0^l + (1/K) sum_k a_k^l (theta_k^l - theta_0^l), with both ends frozen; the a
    minimise the cross-entropy on labelled inputs by Adam and are then baked in. With one expert
    this is WiSE-FT with a position for each layer.

    Paper: Liu et al. 2025, "RoFt-Mol", arXiv:2509.00614 (ROFT-MOL; DWiSE-FT in its first version).
    Departures: the paper has one expert; several are averaged as in wise_ft, each with its own a.
    A step takes a batch of every task, where the code makes 200 passes over the data; the rate is
    ours. a may leave [0, 1].
    """

    paper: ClassVar[str] = "arXiv:2509.00614"
    data: ClassVar[str] = "labelled"
    aim: ClassVar[Aim] = "labels"

    method: MethodChoice = MethodChoice(name="task_arithmetic", scale=1.0, divide="count")  # pyright: ignore
    """What merges with the coefficients."""

    per: Per = "layer"
    """Coefficients for the whole model, one an expert, for each layer, or for each tensor. A layer
    is what its tensors' names say up to the first number, or else one module."""

    start: float = 0.5
    """Every coefficient at the beginning."""

    steps: Annotated[int, Field(ge=1)] = 200
    """Steps, each on one batch of every task."""

    rate: Annotated[float, Field(gt=0)] = 1e-2
    """Learning rate of Adam."""

    def descent(self) -> Descent:
        """Return plain Adam."""
        return Descent(self.steps, self.rate)
