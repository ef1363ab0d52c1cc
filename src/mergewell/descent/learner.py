"""What learners of coefficients share: the parameterisation, the start, the note.

A member says what is learned from (`aim`), its own defaults, and how it goes down.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mergewell.descent.adjustment import (
    Adjustment,
    of_adjusted,
    require_writable,
    write_expert,
    written_name,
)
from mergewell.descent.merge import LearnedMerge, Per
from mergewell.descent.steps import Descent, descend
from mergewell.descent.tasks import Aim, LearningTask, targets
from mergewell.errors import DataError
from mergewell.learners.base import Learned, Learner, Material, OnStep, Trial
from mergewell.recipe import MethodChoice, Recipe


class CoefficientLearner(Learner):
    """A learner of one coefficient an expert, or one an expert and tensor, by descent."""

    method: MethodChoice = MethodChoice(name="task_arithmetic", scale=1.0)  # pyright: ignore
    """What merges with the coefficients."""

    per: Per = "tensor"
    """Coefficients for the whole model, one an expert, for each layer, or for each tensor. A layer
    is what its tensors' names say up to the first number, or else one module."""

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
        self.check(recipe)
        experts = [each.model_copy(update={"coefficient": self.start}) for each in recipe.experts]
        begun = recipe.model_copy(update={"experts": (*experts,), "method": self.method})
        merge = LearnedMerge(
            begun, material.factory(), per=self.per, adjustment=self.adjustment(recipe)
        )
        aim = self.aimed()
        said = targets(
            aim, material.tasks, merge.plan, material.factory, temperature=how.temperature
        )
        lessons, beside = self.lessons(merge, material.tasks)
        losses = descend(merge, lessons, said, aim, how, beside=beside, on_step=on_step)
        window = max(1, min(len(losses) // 10, 20))
        first, last = (sum(part) / window for part in (losses[:window], losses[-window:]))
        learned = merge.coefficients.detach()
        note = (
            f"{name}: {aim} loss {first:.4g} at the start and {last:.4g} at the end of "
            f"{len(losses)} steps, on the inputs that chose; {learned.numel()} coefficients from "
            f"{float(learned.min()):.3f} to {float(learned.max()):.3f}."
        )
        found, more = self.found(merge, lessons)
        note = f"{note} {more}".rstrip()
        result = found.model_copy(update={"notes": (*found.notes, note)})
        trials = (Trial(begun, -first, kept=False), Trial(result, -last, kept=True))
        return Learned(result, -last, trials)

    def aimed(self) -> Aim:
        """Return what is learned from: `aim`, unless a field says otherwise."""
        return self.aim

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that cannot be learned on; any can unless overridden."""
        del recipe

    def adjustment(self, recipe: Recipe) -> Adjustment | None:
        """Return what is learned of the experts beside their coefficients; nothing by default."""
        del recipe

    def lessons(
        self, merge: LearnedMerge, tasks: Sequence[LearningTask]
    ) -> tuple[Sequence[LearningTask], Sequence[nn.Parameter]]:
        """Return the tasks as they are learned, and their own parameters beside the merge."""
        del merge
        return tasks, ()

    def found(self, merge: LearnedMerge, lessons: Sequence[LearningTask]) -> tuple[Recipe, str]:
        """Return the recipe of what was learned, and what to add to its note."""
        del lessons
        return merge.recipe(), ""


class AdjustingLearner(CoefficientLearner):
    """A learner of the experts themselves, by an `Adjustment`; it writes them adjusted."""

    aim: ClassVar[Aim] = "entropy"

    learn_from: Literal["entropy", "expert", "ensemble"] = "entropy"
    """The merged model's own certainty, as in the papers, or KL to what each task's expert, or all
    of them together, say. With few inputs certainty is soon had for wrong answers."""

    folder: str = ""
    """Where the adjusted experts are written, one task vector of the model's size each; has to be
    given. Their names tell what was learned, so that settings share a folder."""

    @abstractmethod
    def adjustment(self, recipe: Recipe) -> Adjustment:
        """Return what is learned of the experts."""

    @abstractmethod
    def told(self, merge: LearnedMerge) -> str:
        """Return what to say of the adjustment, in a sentence."""

    def aimed(self) -> Aim:
        """Return `learn_from`."""
        return self.learn_from

    def check(self, recipe: Recipe) -> None:
        """Require a base and a folder.

        Raises:
            RecipeError, OutputError: as `require_writable`.
        """
        require_writable(recipe, self.folder, self.component_name())

    def found(self, merge: LearnedMerge, lessons: Sequence[LearningTask]) -> tuple[Recipe, str]:
        """Write the adjusted experts, and return the recipe of them."""
        del lessons
        named = written_name(self.component_name(), merge.leaves.values())
        assert merge.adjustment is not None
        merge.adjustment.settle()
        paths: list[Path] = []
        with torch.no_grad():
            for number in range(len(merge.plan.experts)):
                adjusted: dict[str, Tensor] = {}
                for part in merge.parts:
                    if part.task.name in merge.leaves:
                        adjusted[part.task.name] = merge.adjusted(part).task_vectors[number]
                paths.append(write_expert(merge.plan, number, adjusted, self.folder, named))
        merge.place()
        told = f"{self.told(merge)} The adjusted experts stand in {self.folder}."
        return of_adjusted(merge.recipe(), paths), told
