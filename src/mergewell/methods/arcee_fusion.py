"""Take over the changes of one expert that matter, keep the base elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup
from mergewell.statistics.importance import ImportanceQuartiles, importance

_QUARTILES = ImportanceQuartiles()


class ArceeFusion(MergeMethod):
    """Take over the changes of one expert that matter, keep the base elsewhere.

    theta = theta_0 + [I >= median + spread (q_3 - q_1)] tau, with I the importance of each change.

    A change's importance is its size times the divergence of its row's softmax before and after;
    changes are taken over whose importance reaches median + spread * (third - first quartile).

    Paper: none; Arcee AI 2024, "Arcee Fusion" as in mergekit.
    Departures: the quartiles are exact over each tensor, where mergekit draws 1e6 elements of a
    larger one from torch's global generator. The coefficient is not used.
    mergekit's arcee_fusion: the defaults, base_model as the base.
    """

    paper: ClassVar[str] = "https://github.com/arcee-ai/mergekit"
    needs: ClassVar[Needs] = Needs(base=True, experts=1, granularity="row")
    laws: ClassVar[Laws] = Laws(
        single_expert="only the changes that matter are taken over.",
        equal_experts="only the changes that matter are taken over.",
        translation="a softmax weighs what is added to a row.",
        scale="a softmax is not homogeneous.",
        sign="a softmax favours positive entries.",
    )

    spread: float = 1.5
    """How many interquartile ranges above the median a change begins to matter."""

    def statistics(self) -> Sequence[ImportanceQuartiles]:
        """Return the quartiles of the importance over the tensor."""
        return (_QUARTILES,)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base with the important changes taken over."""
        first, median, third = group.statistic(_QUARTILES)["quartiles"]
        matters = importance(group) >= median + self.spread * (third - first)
        return group.required_base + torch.where(matters, group.task_vectors[0], 0.0)
