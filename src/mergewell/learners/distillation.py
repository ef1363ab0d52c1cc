"""Teach the merged model what its experts answer: its own weights move, on unlabelled inputs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mergewell.distil.teaching import Teaching, teach
from mergewell.distil.weights import of_weights, require_folder, write_weights
from mergewell.errors import DataError, RecipeError
from mergewell.learners.base import Learned, Learner, Material, OnStep, Trial
from mergewell.plan import make_plan
from mergewell.recipe import MethodChoice, Recipe
from mergewell.repair import mended
from mergewell.run import merge_tensors


class Distillation(Learner):
    """Teach the merged model what its experts answer: its own weights move, on unlabelled inputs.

    Starts from the recipe's merge, or from one expert, and lowers the distance to what each task's
    expert says (`aim` expert) or to the mean of them all (ensemble), by Adam. The experts need
    share no base, only an architecture: of experts of different origins name none and start from
    one of them. Weights that are equal in all models stay as they are, and so do BatchNorm's
    running statistics. A checkpoint of the model's size is written, and the recipe is of it alone.

    Paper: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    Departures: no labels, and no factor of temperature squared. The last step's weights are kept.
    """

    paper: ClassVar[str] = "arXiv:1503.02531"
    data: ClassVar[str] = "unlabelled"

    aim: Literal["expert", "ensemble"] = "expert"
    """Whose answers are learned: the task's own expert's, or the mean of all experts' logits."""

    match: Literal["answers", "outputs"] = "answers"
    """Match probabilities (KL), where logits are known, or what the network returns (squares)."""

    method: MethodChoice | None = None
    """What merges at the start; the recipe's own method when absent."""

    start: Annotated[int, Field(ge=0)] = 0
    """The expert to start from, from 1 on, or 0 for the merge."""

    steps: Annotated[int, Field(ge=0)] = 200
    """Steps, each on one batch of every task; with 0 the weights are those it starts from."""

    rate: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate of Adam."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softens answers; of no use to outputs."""

    folder: str = ""
    """Where the weights are written, as distillation-HASH.safetensors; has to be given."""

    def learn(
        self, recipe: Recipe, material: Material, *, on_step: OnStep | None = None
    ) -> Learned:
        """Return the recipe of the weights that were learned and written.

        Raises:
            DataError: no inputs, or inputs of no known expert where its answers are to be learned.
            RecipeError, OutputError: no folder, or an expert to start from that is none.
        """
        require_folder(recipe, self.folder, "distillation")
        if self.start > len(recipe.experts):
            raise RecipeError(
                f"distillation: start = {self.start} names none of {len(recipe.experts)} experts; "
                "count from 1, or give 0 for the recipe's merge."
            )
        if not material.tasks:
            raise DataError("distillation learns from inputs of each expert's task; give some.")
        begun = recipe if self.method is None else recipe.model_copy(update={"method": self.method})
        plan = mended(make_plan(begun))
        first = dict(merge_tensors(plan))
        if self.start:
            expert = plan.experts[self.start - 1]
            first = {name: expert[name] if name in expert else first[name] for name in first}
        how = Teaching(self.aim, self.match, self.steps, self.rate, self.temperature)
        taught = teach(plan, first, material.factory, material.tasks, how, on_step=on_step)
        path = write_weights(plan, taught.weights, self.folder, "distillation")
        said = {"answers": "KL divergence", "outputs": "relative squared distance"}[self.match]
        note = (
            f"distillation: {said} to the {self.aim} {taught.after:.4g}, at the start "
            f"{taught.before:.4g}, on the inputs that taught; {taught.moved} tensors moved in "
            f"{self.steps} steps, and the model of {len(recipe.experts)} experts stands in {path}."
        )
        result = of_weights(begun, path)
        result = result.model_copy(update={"notes": (*recipe.notes, note)})
        trials = (Trial(begun, -taught.before, False), Trial(result, -taught.after, True))
        return Learned(result, -taught.after, trials)
