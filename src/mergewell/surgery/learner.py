"""What learners of corrections share: the start, the tasks one by one, the file, the note."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from mergewell.distil.weights import require_folder
from mergewell.errors import DataError
from mergewell.learners.base import Learned, Learner, Material, OnStep, Trial
from mergewell.models.dataflow import Batch
from mergewell.models.loader import load_state
from mergewell.plan import make_plan
from mergewell.recipe import MethodChoice, Recipe
from mergewell.repair import mended
from mergewell.run import merge_tensors
from mergewell.surgery.companion import task_names, write_corrections
from mergewell.surgery.training import Schooled, Schooling, representations, school


class SurgeryLearner(Learner):
    """A learner that leaves the merge as it is and writes corrections for each task beside it."""

    data: ClassVar[str] = "unlabelled"

    method: MethodChoice | None = None
    """What merges; the recipe's own method when absent."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of a correction."""

    steps: Annotated[int, Field(ge=0)] = 500
    """Steps a task, each on one of its batches; with 0 the corrections do nothing."""

    rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of Adam."""

    at: str = ""
    """The module that gives the features a head reads; the whole network when absent."""

    folder: str = ""
    """Where the companion is written, as NAME-HASH.companion.safetensors; has to be given."""

    @abstractmethod
    def places(self, module: nn.Module) -> Sequence[str]:
        """Return the modules behind which corrections go, the last of them `at`."""

    def learn(
        self, recipe: Recipe, material: Material, *, on_step: OnStep | None = None
    ) -> Learned:
        """Return the recipe of the merge, with a note of the companion that was written.

        Raises:
            DataError: an expert without inputs of its task, or inputs of an unknown one.
            RecipeError, OutputError: no folder for the companion.
            ModelError: the network has no module `at`.
        """
        name = self.component_name()
        require_folder(recipe, self.folder, name)
        inputs = _by_expert(material, len(recipe.experts), name)
        merge = recipe if self.method is None else recipe.model_copy(update={"method": self.method})
        plan = make_plan(merge)
        merged, expert = material.factory(), material.factory()
        weights = dict(merge_tensors(mended(plan)))
        load_state(merged, weights)
        places = self.places(merged)
        how = Schooling(self.rank, self.steps, self.rate, recipe.seed)
        found: dict[str, Schooled] = {}
        done, whole = 0, self.steps * len(inputs)

        def step() -> None:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step("steps", done, whole)

        tasks = task_names(each.path for each in recipe.experts)
        for task, checkpoint, batches in zip(tasks, plan.experts, inputs, strict=True):
            load_state(expert, {key: checkpoint[key] for key in checkpoint})
            targets = representations(expert, places, batches)
            found[task] = school(merged, batches, targets, how, on_step=step)
        path = write_corrections(
            self.folder,
            {task: each.corrections for task, each in found.items()},
            merged=weights,
            made_by=name,
            parameters=self.model_dump(mode="json", exclude={"folder", "method"}),
        )
        before, after = (
            sum(getattr(each, side) for each in found.values()) / len(found)
            for side in ("before", "after")
        )
        note = (
            f"{name}: representation bias {after:.4g}, without corrections {before:.4g}, on the "
            f"inputs that taught; {len(places)} corrections of rank {self.rank} for each of "
            f"{', '.join(found)} stand in {path}. The merged model alone is as it was: whoever "
            "uses a correction has to know the task (mergewell.surgery.companion.load_corrected)."
        )
        result = merge.model_copy(update={"notes": (*recipe.notes, note)})
        trials = (Trial(merge, -before, kept=False), Trial(result, -after, kept=True))
        return Learned(result, -after, trials)


def _by_expert(material: Material, count: int, name: str) -> list[list[Batch]]:
    """Return each expert's own batches."""
    found: list[list[Batch]] = [[] for _ in range(count)]
    for task in material.tasks:
        if task.expert is None or not 0 <= task.expert < count:
            raise DataError(
                f"{name} learns from each expert on its own task; give inputs for each of {count} "
                "experts by itself, in their order."
            )
        found[task.expert] += task.batches
    for number, batches in enumerate(found, 1):
        if not batches:
            raise DataError(f"{name} has no inputs of expert {number}'s task; give some.")
    return found
