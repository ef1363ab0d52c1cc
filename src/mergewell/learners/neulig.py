"""Learn convex coefficients that make merging agree with ensembling: NeuLig's, as one model."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from mergewell.descent.tasks import Aim
from mergewell.errors import DataError
from mergewell.learners.base import Learned, Learner, Material, OnStep, Trial
from mergewell.neulig.modes import coefficients_of, described, merges, recipe_of
from mergewell.neulig.offsets import Penalty, offsets
from mergewell.neulig.portland import Constant, Portland, embeddings, pooled
from mergewell.neulig.training import Training, train
from mergewell.plan import make_plan
from mergewell.recipe import Recipe


class NeuLig(Learner):
    """Learn convex coefficients that make merging agree with ensembling: NeuLig's, as one model.

    Every expert is run once over each task's inputs; then coefficients on the simplex are trained
    so that the ensemble sum_j b_j z_j answers well, and the experts are averaged with them. `mode`
    static learns one b; global trains Portland, whose b depends on the input, and takes its mean.
    The paper's own modes merge anew for every batch: a router, in `mergewell.neulig.modes`.

    Paper: NeuLig (papers.md section 2). Departures: the paper gives no single merged model. `aim`
    "expert" (KL to each task's expert) is ours; "labels" and "entropy" are its "sup" and "semi".
    """

    data: ClassVar[str] = "unlabelled"

    mode: Literal["static", "global"] = "static"
    """One learned vector of coefficients, or the mean of a network's."""

    aim: Aim = "expert"
    """What the ensemble is to say."""

    penalty: Penalty = "dispersion"
    """scalar as the paper's code, offset as its text, dispersion as the gap's bound, or none."""

    share: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the penalty."""

    epochs: Annotated[int, Field(ge=1)] = 200
    """Passes over the inputs."""

    rate: Annotated[float, Field(gt=0)] = 1e-2
    """Learning rate of Adam."""

    batch: Annotated[int, Field(ge=1)] = 128
    """Samples of a step."""

    def learn(
        self, recipe: Recipe, material: Material, *, on_step: OnStep | None = None
    ) -> Learned:
        """Return the recipe of the average with the learned coefficients."""
        if not material.tasks:
            raise DataError("neulig learns from inputs of each expert's task; give some.")
        if self.aim == "labels" and not all(task.labels for task in material.tasks):
            raise DataError("neulig with aim=labels needs labels of every task; give them.")
        plan = make_plan(recipe)
        outputs = embeddings(plan, material.factory, material.tasks, on_step=on_step)
        features = pooled(outputs[0]).shape[-1]
        count = len(plan.experts)
        network = Constant(count) if self.mode == "static" else Portland(
            count, features, seed=recipe.seed
        )  # fmt: skip
        how = Training(
            self.aim, self.penalty, self.share, self.epochs, self.batch, self.rate, recipe.seed
        )
        history = train(network, outputs, material.tasks, offsets(plan), how, on_step=on_step)
        seen = [coefficients_of(network, each) for each in outputs]
        shares = merges(self.mode, seen, seen, 0).coefficients[0]
        found = recipe_of(recipe, shares)
        note = (
            f"neulig: {described(self.mode, shares)} Loss of the ensemble {history[0]:.4g} at the "
            f"start and {history[-1]:.4g} at the end, on the inputs that chose."
        )
        result = found.model_copy(update={"notes": (*found.notes, note)})
        even = recipe_of(recipe, torch.full((count,), 1 / count))
        trials = (Trial(even, -history[0], kept=False), Trial(result, -history[-1], kept=True))
        return Learned(result, -history[-1], trials)
