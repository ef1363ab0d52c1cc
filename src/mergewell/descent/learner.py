"""What learners of coefficients share: the parameterisation, the start, the note.

A member says what is learned from (`aim`), its own defaults, and how it goes down.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

from pydantic import Field

from mergewell.descent.merge import LearnedMerge, Per
from mergewell.descent.steps import Descent, descend
from mergewell.descent.tasks import Aim, targets
from mergewell.errors import DataError
from mergewell.learners.base import Learned, Learner, Material, OnStep, Trial
from mergewell.recipe import MethodChoice, Recipe


class CoefficientLearner(Learner):
    """A learner of one coefficient an expert, or one an expert and tensor, by descent."""

    method: MethodChoice = MethodChoice(name="task_arithmetic", scale=1.0)  # pyright: ignore
    """What merges with the coefficients."""

    per: Per = "tensor"
    """Coefficients for the whole model, one an expert, or for each tensor."""

    start: float = 0.3
    """Every coefficient at the beginning."""

    steps: Annotated[int, Field(ge=1)] = 500
    """Steps, each on one batch of every task."""

    rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of Adam."""

    aim: ClassVar[Aim]
    """What is learned from."""

    @abstractmethod
    def descent(self) -> Descent:
        """Return how the coefficients go down."""

    def learn(
        self, recipe: Recipe, material: Material, *, on_step: OnStep | None = None
    ) -> Learned:
        """Return the recipe with learned coefficients, and a note of the loss before and after."""
        name = self.component_name()
        if not material.tasks:
            raise DataError(f"{name} learns from inputs of each expert's task; give some.")
        how = self.descent()
        experts = [each.model_copy(update={"coefficient": self.start}) for each in recipe.experts]
        begun = recipe.model_copy(update={"experts": (*experts,), "method": self.method})
        merge = LearnedMerge(begun, material.factory(), per=self.per)
        said = targets(
            self.aim, material.tasks, merge.plan, material.factory, temperature=how.temperature
        )
        losses = descend(merge, material.tasks, said, self.aim, how, on_step=on_step)
        window = max(1, min(len(losses) // 10, 20))
        first, last = (sum(part) / window for part in (losses[:window], losses[-window:]))
        learned = merge.coefficients.detach()
        note = (
            f"{name}: {self.aim} loss {first:.4g} at the start and {last:.4g} at the end of "
            f"{len(losses)} steps, on the inputs that chose; {learned.numel()} coefficients from "
            f"{float(learned.min()):.3f} to {float(learned.max()):.3f}."
        )
        found = merge.recipe()
        result = found.model_copy(update={"notes": (*found.notes, note)})
        trials = (Trial(begun, -first, kept=False), Trial(result, -last, kept=True))
        return Learned(result, -last, trials)
