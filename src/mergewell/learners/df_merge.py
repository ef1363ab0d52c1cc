"""Search coefficients of a Fisher-weighted merge whose weights follow them (DF-Merge)."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergewell.descent.adjustment import (
    of_adjusted,
    require_writable,
    write_expert,
    written_name,
)
from mergewell.descent.dynamic_fisher import DynamicFisher
from mergewell.descent.merge import LearnedMerge
from mergewell.descent.search import Acquisition, bayesian
from mergewell.learners.base import Learned, Learner, Material, OnStep, Trial
from mergewell.recipe import MethodChoice, Recipe


class DfMerge(Learner):
    """Search coefficients of a Fisher-weighted merge whose weights follow them (DF-Merge).

    theta = theta_0 + K sum_k F_k c_k tau_k / sum_k F_k, element by element, with F_k the diagonal
    Fisher information of theta_0 + c_k tau_k on task k's inputs: made anew for each c in [0, 1]^K.
    Bayesian optimisation searches c for the best metric on labelled samples. The result is a recipe
    of the experts weighted so, at the c that was found.

    Paper: Lee et al. 2025, "DF-Merge", arXiv:2504.18992, section 3, with its released code.
    Departures: of the classes' likelihood, answers are drawn (4 a sample), which is an option
    there. The Gaussian process has one length scale; candidates are drawn where the code's library
    climbs. Buffers, such as BatchNorm's statistics, are added up as they are.
    """

    paper: ClassVar[str] = "arXiv:2504.18992"
    data: ClassVar[str] = "labelled"

    random: Annotated[int, Field(ge=1)] = 10
    """Points that are drawn before the search begins."""

    steps: Annotated[int, Field(ge=0)] = 50
    """Points that the search names."""

    bound: Annotated[float, Field(gt=0)] = 1.0
    """Largest coefficient. K times a weight that may be wholly one expert's is far: 1 is the
    paper's, and too far for experts whose sum of task vectors is."""

    samples: Annotated[int, Field(ge=1)] = 30
    """Samples of each task for the Fisher information, its first ones."""

    acquisition: Acquisition = "ei"
    """Expected improvement, or the upper confidence bound."""

    folder: str = ""
    """Where the weighted experts are written, one task vector of the model's size each; has to be
    given. Their names tell what was found, so that settings share a folder."""

    def learn(
        self, recipe: Recipe, material: Material, *, on_step: OnStep | None = None
    ) -> Learned:
        """Return the recipe of the weighted experts with the best coefficients."""
        metric = self.metric_of(material)
        require_writable(recipe, self.folder, self.component_name())
        method = MethodChoice(name="task_arithmetic", scale=1.0)  # pyright: ignore
        begun = recipe.model_copy(update={"method": method})
        merge = LearnedMerge(begun, material.factory(), per="task")
        fisher = DynamicFisher(merge, material.tasks, self.samples, recipe.seed)
        trials: list[Trial] = []

        def judge(share: Tensor) -> float:
            point = self.bound * share
            fisher.place(point)
            score = metric(merge.module)
            trials.append(Trial(_at(begun, point), score, kept=False))
            if on_step is not None:
                on_step("points", len(trials), self.random + self.steps)
            return score

        tried = bayesian(
            judge,
            len(recipe.experts),
            random=self.random,
            steps=self.steps,
            acquisition=self.acquisition,
            seed=recipe.seed,
        )
        best = max(range(len(tried)), key=lambda place: tried[place][1])
        point, score = self.bound * tried[best][0], tried[best][1]
        named = written_name(self.component_name(), [point])
        total = fisher.total(point)
        paths = [
            write_expert(merge.plan, k, fisher.weighted(point, k, total), self.folder, named)
            for k in range(len(recipe.experts))
        ]
        fisher.place(point)
        note = (
            f"df_merge: {score:.4g} on the held-out samples that chose it, the median of "
            f"{len(tried)} points {sorted(value for _, value in tried)[len(tried) // 2]:.4g}. The "
            f"weighted experts stand in {self.folder}."
        )
        result = of_adjusted(_at(begun, point), paths)
        result = result.model_copy(update={"notes": (*recipe.notes, note)})
        trials.append(Trial(result, score, kept=True))
        return Learned(result, score, tuple(trials))


def _at(recipe: Recipe, point: Tensor) -> Recipe:
    experts = [
        expert.model_copy(update={"coefficient": float(c)})
        for expert, c in zip(recipe.experts, point, strict=True)
    ]
    return recipe.model_copy(update={"experts": (*experts,)})
