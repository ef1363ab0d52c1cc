"""Learn one mask over all weights in which the experts' task vectors get along (Concrete)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergewell.descent.adjustment import Adjustment, with_task_vectors
from mergewell.descent.learner import AdjustingLearner
from mergewell.descent.merge import LearnedMerge, Per
from mergewell.descent.steps import Descent
from mergewell.recipe import Recipe
from mergewell.tensor_group import TensorGroup, random_key

_EDGE = 1e-6
"""Random numbers stay so far from 0 and 1, where their logits would not be finite."""


class SharedMask(Adjustment):
    """A relaxed Bernoulli mask for each element, shared by the experts, divided by its mean.

    m = sigmoid((log u - log(1 - u) + x) / temperature), with u drawn anew at each step from the
    seed; when settled u = 1/2, the median.
    """

    def __init__(self, logit: float, temperature: float, seed: int) -> None:
        """Begin with this logit everywhere."""
        self._logit, self._temperature, self._seed = logit, temperature, seed
        self._draw: int | None = 0

    def start(self, group: TensorGroup) -> Tensor:
        """Return the logits x, of the tensor's shape, the same everywhere."""
        return torch.full_like(group.experts[0], self._logit)

    def advance(self) -> None:
        """Draw new random numbers."""
        if self._draw is not None:
            self._draw += 1

    def settle(self) -> None:
        """Take the median mask from here on."""
        self._draw = None

    def adjusted(self, group: TensorGroup, leaf: Tensor) -> TensorGroup:
        """Return the group with its task vectors times the mask."""
        logits = leaf
        if self._draw is not None:
            key = random_key(self._seed, group.name, self._draw)
            drawn = torch.rand(leaf.shape, generator=torch.Generator().manual_seed(key))
            logits = leaf + drawn.clamp(_EDGE, 1 - _EDGE).logit().to(leaf)
        mask = (logits / self._temperature).sigmoid()
        mask = mask / mask.mean()
        return with_task_vectors(group, [tau * mask for tau in group.task_vectors])


class Concrete(AdjustingLearner):
    """Learn one mask over all weights in which the experts' task vectors get along (Concrete).

    A shared, relaxed Bernoulli mask on the task vectors, divided by its mean tensor by tensor,
    minimises the entropy of the merged model's answers to unlabelled inputs of every task; the
    coefficients stay at `start`. The result is a recipe of the masked experts: Concrete task
    arithmetic. For Concrete AdaMerging run `adamerging` on that recipe's experts.

    Paper: Tang et al. 2023, "Concrete subspace learning", arXiv:2312.06173, algorithm 1.
    Departures: the mask that is kept is the median one, u = 1/2; FusionBench keeps one more random
    draw. AdaMerging follows and is not nested in the mask's steps. `learn_from` may be the experts'
    answers, which is ours. The logits, as many as one model's weights, and Adam's two moments of
    them are held.
    """

    paper: ClassVar[str] = "arXiv:2312.06173"
    data: ClassVar[str] = "unlabelled"

    per: Per = "task"
    """The coefficients do not move; these are the experts' own."""

    steps: Annotated[int, Field(ge=1)] = 2000
    """Steps, each on one batch of every task."""

    temperature: Annotated[float, Field(gt=0)] = 0.5
    """Of the relaxed mask; the smaller, the harder."""

    logit: float = 0.0
    """Every mask's logit at the beginning."""

    def adjustment(self, recipe: Recipe) -> SharedMask:
        """Return the mask, seeded by the recipe."""
        return SharedMask(self.logit, self.temperature, recipe.seed)

    def descent(self) -> Descent:
        """Return plain Adam on the mask alone."""
        return Descent(self.steps, self.rate, coefficients=False)

    def told(self, merge: LearnedMerge) -> str:
        """Return how much of the weights the mask keeps."""
        kept = sum(int((leaf > self.logit).sum()) for leaf in merge.leaves.values())
        count = sum(leaf.numel() for leaf in merge.leaves.values())
        return f"The mask rose on {kept / count:.0%} of {count} weights; coefficients did not move."
