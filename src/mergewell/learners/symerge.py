"""Learn coefficients together with one layer for each task, from what its expert says (SyMerge)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torch import nn

from mergewell.descent.adjustment import require_folder, written_name
from mergewell.descent.learner import CoefficientLearner
from mergewell.descent.merge import LearnedMerge
from mergewell.descent.steps import Descent
from mergewell.descent.task_layers import OwnLayerTask, with_own_layers, write_task_layers
from mergewell.descent.tasks import Aim, LearningTask
from mergewell.recipe import Recipe


class SyMerge(CoefficientLearner):
    """Learn coefficients together with one layer for each task, from what its expert says.

    A coefficient for each expert and tensor, and a layer that each task has of its own, begun from
    its expert's, minimise KL(expert || merged) on unlabelled inputs of every task. The result is a
    recipe and a file of the layers: whoever runs the merged model has to know the task, as with
    heads, and puts its layer in place (`descent.task_layers.load_task_layer`).

    Paper: Jung et al. 2026, "SyMerge", arXiv:2412.19098, section 4.
    Departures: steps, rate and start are AdaMerging's, as the paper's code could not be read;
    cross-entropy to soft labels differs from KL by a constant. The recipe's merge has a layer of
    its own in that place, at the start's coefficients.
    """

    paper: ClassVar[str] = "arXiv:2412.19098"
    data: ClassVar[str] = "unlabelled"
    aim: ClassVar[Aim] = "expert"

    layer: str = ""
    """Pattern of the names of the tensors that each task has of its own, such as classifier.*;
    without one the heads outside of the model, where they are given as modules."""

    layer_rate: float | None = None
    """Learning rate of the layers; `rate` when absent."""

    folder: str = ""
    """Where the file of the layers is written; has to be given. Its name tells what was learned."""

    def check(self, recipe: Recipe) -> None:
        """Require a folder.

        Raises:
            RecipeError, OutputError: as `require_folder`.
        """
        del recipe
        require_folder(self.folder, self.component_name())

    def lessons(
        self, merge: LearnedMerge, tasks: Sequence[LearningTask]
    ) -> tuple[Sequence[LearningTask], Sequence[nn.Parameter]]:
        """Return the tasks with their own layers, and these layers' parameters."""
        found = with_own_layers(merge, tasks, self.layer)
        return found, [parameter for task in found for parameter in task.own.values()]

    def descent(self) -> Descent:
        """Return plain Adam."""
        return Descent(self.steps, self.rate, beside_rate=self.layer_rate)

    def found(self, merge: LearnedMerge, lessons: Sequence[LearningTask]) -> tuple[Recipe, str]:
        """Return the recipe, and write the layers."""
        tasks = [task for task in lessons if isinstance(task, OwnLayerTask)]
        own = [parameter for task in tasks for parameter in task.own.values()]
        named = written_name(self.component_name(), [merge.coefficients, *own])
        path = Path(self.folder) / f"{named}.layers.safetensors"
        write_task_layers(path, tasks)
        return merge.recipe(), f"Each task's own layer stands in {path}: put it in place to run it."
