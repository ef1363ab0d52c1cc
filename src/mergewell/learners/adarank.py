"""Learn which singular directions of each expert's task vectors serve the merge, and how far."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergewell import linalg
from mergewell.component import Fraction
from mergewell.descent.adjustment import Adjustment, with_task_vectors
from mergewell.descent.learner import AdjustingLearner
from mergewell.descent.merge import LearnedMerge
from mergewell.descent.steps import Descent
from mergewell.matrices import is_matrix
from mergewell.recipe import Recipe
from mergewell.statistics.ops import rows_of
from mergewell.tensor_group import TensorGroup

_START = 0.1
"""Logit of a direction that is kept at the beginning; its negative of one that is not."""


class RankMasks(Adjustment):
    """One logit for each singular direction of each expert's task matrix; positive keeps it.

    The mask is hard, 0 or 1, and its gradient that of sigmoid(logit / temperature). All
    decompositions are held.
    """

    def __init__(self, density: float, temperature: float) -> None:
        """Keep this share of each expert's longest directions at the beginning."""
        self._density, self._temperature = density, temperature
        self._factors: dict[str, list[linalg.Factors]] = {}

    def start(self, group: TensorGroup) -> Tensor | None:
        """Return logits [K, q], of the directions longest first; none for what is no matrix."""
        if not is_matrix(group.experts[0].shape):
            return None
        found = [linalg.svd(rows_of(tau)) for tau in group.task_vectors]
        self._factors[group.name] = found
        width = max(len(factors.values) for factors in found)
        if not width:
            return None
        kept = max(1, int(self._density * min(rows_of(group.experts[0]).shape) + 1e-9))
        logits = torch.full((len(found), width), _START, dtype=torch.float32)
        logits[:, kept:] = -_START
        return logits

    def adjusted(self, group: TensorGroup, leaf: Tensor) -> TensorGroup:
        """Return the group without the directions whose logits are not positive."""
        soft = (leaf / self._temperature).sigmoid()
        mask = soft + ((leaf > 0).to(soft.dtype) - soft).detach()
        # what is dropped is taken away, so that an expert that keeps all is that very expert
        return with_task_vectors(
            group,
            [
                tau - f.matrix(f.values * (1 - row[: len(f.values)])).view_as(tau)
                for tau, f, row in zip(
                    group.task_vectors, self._factors[group.name], mask, strict=True
                )
            ],
        )


class AdaRank(AdjustingLearner):
    """Learn which singular directions of each expert's task vectors serve the merge, and how far.

    A hard mask on every direction of every expert's task matrix, with straight-through gradients,
    and a coefficient for each expert and tensor minimise the entropy of the merged model's answers
    to unlabelled inputs of every task. The result is a recipe of the pruned experts.

    Paper: Lee et al. 2026, "AdaRank", arXiv:2503.22178, section 4, with its released code.
    Departures: task vectors are those from the recipe's base; for the paper's form about the
    average (CART) merge that first and name it as the base. Other ways of merging the pruned
    experts, Iso-CTS in the paper, are `method`. Kernels of convolutions are folded to matrices;
    every matrix is pruned, not only those of attention and MLPs. Adam's steps are of the size of
    the rate and masks start 0.1 from the threshold: take steps times mask_rate well above 0.1.
    `learn_from` may be the experts' answers, which is ours. All decompositions are held.
    """

    paper: ClassVar[str] = "arXiv:2503.22178"
    data: ClassVar[str] = "unlabelled"

    steps: Annotated[int, Field(ge=1)] = 10_000
    """Steps, each on one batch of every task."""

    density: Fraction = 1.0
    """Share of each expert's directions, the longest, that are kept at the beginning."""

    mask_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the masks' logits."""

    temperature: Annotated[float, Field(gt=0)] = 10.0
    """Softens the masks' gradients."""

    def adjustment(self, recipe: Recipe) -> RankMasks:
        """Return the masks."""
        del recipe
        return RankMasks(self.density, self.temperature)

    def descent(self) -> Descent:
        """Return plain Adam, with a rate for the masks."""
        return Descent(self.steps, self.rate, leaf_rate=self.mask_rate)

    def told(self, merge: LearnedMerge) -> str:
        """Return how many directions are left."""
        kept = sum(int((leaf > 0).sum()) for leaf in merge.leaves.values())
        known = sum(leaf.numel() for leaf in merge.leaves.values())
        return f"Of {known} singular directions {kept} are kept."
