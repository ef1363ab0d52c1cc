"""Learn coefficients in a flat place, where the merged model answers as each task's expert."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from mergewell.descent.learner import CoefficientLearner
from mergewell.descent.steps import Descent
from mergewell.descent.tasks import Aim


class SaMerging(CoefficientLearner):
    """Learn coefficients in a flat place, where the merged model answers as each task's expert.

    Minimises KL(expert || merged) on unlabelled inputs of every task, softened by a temperature,
    with adaptive sharpness-aware steps from coefficients of 0.

    Paper: Dalili and Mahdavi 2025, "Model Merging via Multi-Teacher Knowledge Distillation",
    arXiv:2512.21288, section 4.
    Departures: as in the paper's code no factor of temperature squared. At coefficients of 0 the
    first perturbation is 0.
    """

    paper: ClassVar[str] = "arXiv:2512.21288"
    data: ClassVar[str] = "unlabelled"
    aim: ClassVar[Aim] = "expert"

    start: float = 0.0
    """Every coefficient at the beginning."""

    steps: Annotated[int, Field(ge=1)] = 1000
    """Steps, each on one batch of every task."""

    radius: Annotated[float, Field(ge=0)] = 0.07
    """Adaptive SAM's rho; 0 turns it off."""

    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Softens the experts' and the merged model's answers."""

    decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay of the coefficients."""

    def descent(self) -> Descent:
        """Return Adam with adaptive SAM."""
        return Descent(self.steps, self.rate, self.decay, self.radius, self.temperature)
