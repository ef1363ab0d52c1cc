"""Learner: from a recipe and data to a better recipe, carried out by the one executor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mergewell.component import Component, Family
from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError
from mergewell.models.dataflow import Batch
from mergewell.models.loader import load_state
from mergewell.plan import make_plan
from mergewell.recipe import Recipe
from mergewell.repair import mended
from mergewell.run import merge_tensors

Metric = Callable[[nn.Module], float]
"""How well a merged module does; higher is better."""

OnStep = Callable[[str, int, int], None]
"""Called with the step's name, what is done of it and what there is to do."""


@dataclass(frozen=True, slots=True)
class Material:
    """What a learner may use beside the recipe."""

    factory: Callable[[], nn.Module]
    """Makes a module in eval mode, with whatever weights."""

    metric: Metric | None = None
    """On held-out samples, which should not be those that the result is judged on."""

    tasks: Sequence[LearningTask] = ()
    """Inputs by task, with labels, heads and the task's own expert where they are known."""

    @property
    def batches(self) -> list[Batch]:
        """The inputs of all tasks."""
        return [batch for task in self.tasks for batch in task.batches]

    @property
    def owners(self) -> list[int | None]:
        """Which expert, from 0, each batch is of, where that is known."""
        return [task.expert for task in self.tasks for _ in task.batches]


@dataclass(frozen=True, slots=True)
class Trial:
    """One recipe that was tried."""

    recipe: Recipe
    score: float
    kept: bool
    """True if the result builds on it."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What a learner made."""

    recipe: Recipe
    score: float
    """The metric of the recipe's merge, on the samples that chose it: it flatters."""
    trials: tuple[Trial, ...]
    """All that was tried, in order."""


class Learner(Component):
    """Makes a recipe of a recipe: the parameters are the fields, the work is `learn`."""

    paper: ClassVar[str] = ""

    data: ClassVar[str] = ""
    """What data it needs, in words: "labelled" or "unlabelled"."""

    @abstractmethod
    def learn(
        self, recipe: Recipe, material: Material, *, on_step: OnStep | None = None
    ) -> Learned:
        """Return a better recipe for the same base and experts.

        Raises:
            DataError: the material lacks what the learner needs.
            UserError: as `make_plan` and `merge_tensors`.
        """

    def metric_of(self, material: Material) -> Metric:
        """Return the material's metric.

        Raises:
            DataError: there is none.
        """
        if material.metric is None:
            raise DataError(
                f"{self.component_name()} chooses by a metric on held-out labelled samples; give "
                "labelled data."
            )
        return material.metric


LEARNERS: Family[Learner] = Family("mergewell.learners", Learner, "learner")
"""All learners, by name."""


def judged(recipe: Recipe, material: Material, metric: Metric) -> float:
    """Return the metric of a recipe's merge, made in memory.

    Raises:
        UserError: as `make_plan`, `merge_tensors` and `load_state`.
    """
    module = material.factory()
    load_state(module, dict(merge_tensors(mended(make_plan(recipe)))))
    return metric(module)
