"""Search the experts' coefficients for the smallest loss on a few labelled examples (LoraHub)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergewell.descent.merge import LearnedMerge
from mergewell.descent.search import evolve
from mergewell.descent.steps import mean_loss
from mergewell.descent.tasks import targets
from mergewell.learners.base import Learned, Learner, Material, OnStep, Trial
from mergewell.recipe import MethodChoice, Recipe


class LoraHub(Learner):
    """Search the experts' coefficients for the smallest loss on a few labelled examples (LoraHub).

    minimise loss + penalty * mean_k |c_k| over c in [-bound, bound]^K, from 0, without gradients:
    each point costs one merge and one pass over the examples, which may be of a task that no
    expert has seen.

    Paper: Huang et al. 2024, "LoraHub", arXiv:2307.13269, section 3, with its released code.
    Departures: the products BA are added up; the paper adds the factors A and B up by themselves,
    which makes cross terms. A (1+1) evolution strategy with the one-fifth rule searches in place of
    nevergrad's NGOpt. Experts need not be adapters. Of several tasks the losses' mean counts.
    """

    paper: ClassVar[str] = "arXiv:2307.13269"
    data: ClassVar[str] = "labelled"

    method: MethodChoice = MethodChoice(name="task_arithmetic", scale=1.0)  # pyright: ignore
    """What merges with the coefficients."""

    steps: Annotated[int, Field(ge=1)] = 40
    """Points that are tried, the first of which is 0."""

    bound: Annotated[float, Field(gt=0)] = 1.5
    """Largest magnitude of a coefficient."""

    penalty: Annotated[float, Field(ge=0)] = 0.05
    """Factor on the mean magnitude of the coefficients."""

    def learn(
        self, recipe: Recipe, material: Material, *, on_step: OnStep | None = None
    ) -> Learned:
        """Return the recipe with the best coefficients that were tried."""
        count = len(recipe.experts)
        begun = recipe.model_copy(update={"method": self.method})
        merge = LearnedMerge(begun, material.factory(), per="task")
        said = targets("labels", material.tasks, merge.plan, material.factory)
        recipes: list[Recipe] = []

        def judge(point: Tensor) -> float:
            with torch.no_grad():
                merge.coefficients.copy_(point[None])
            merge.place()
            found = mean_loss(merge, material.tasks, said, "labels")
            recipes.append(merge.recipe())
            if on_step is not None:
                on_step("points", len(recipes), self.steps)
            return found + self.penalty * float(point.abs().mean())

        tried = evolve(
            judge,
            torch.zeros(count, dtype=torch.float64),
            low=-self.bound,
            high=self.bound,
            budget=self.steps,
            seed=recipe.seed,
        )
        values = [value for _, value in tried]
        best = min(range(len(values)), key=values.__getitem__)
        note = (
            f"lorahub: loss and penalty {values[best]:.4g} at the best of {len(values)} points, "
            f"{values[0]:.4g} at the base, on the examples that chose."
        )
        result = recipes[best].model_copy(update={"notes": (*recipe.notes, note)})
        trials = [
            Trial(each, -value, kept=place == best)
            for place, (each, value) in enumerate(zip(recipes, values, strict=True))
        ]
        return Learned(result, -values[best], tuple(trials))
