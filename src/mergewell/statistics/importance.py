"""How much of a change matters: its size times the shift of its row's softmax, and quantiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mergewell.statistics.base import State
from mergewell.statistics.ops import OrderStatistic, key_value, sort_key
from mergewell.tensor_group import TensorGroup, Value

_QUANTILES = (0.25, 0.5, 0.75)


def importance(group: TensorGroup) -> Tensor:
    """Return |tau| times KL(softmax of the expert's row || softmax of the base's row).

    Rows run along the last dimension; 1e-8 is added to the probabilities. Rounded to float32 (the
    values stay in float64), as the quantiles are.
    """
    probable = group.experts[0].softmax(-1) + 1e-8
    before = group.required_base.softmax(-1) + 1e-8
    divergence = (probable * (probable / before).log()).sum(-1, keepdim=True)
    return key_value(sort_key(group.task_vectors[0].abs() * divergence))


class ImportanceQuartiles(OrderStatistic):
    """The quartiles of one expert's importance scores over a tensor, exactly.

    The q-th is the score at place floor(q (n - 1)) in rising order. Needs blocks of whole rows.
    """

    signed: ClassVar[bool] = True
    cuts_ties: ClassVar[bool] = False
    passes: ClassVar[int] = 2

    def scores(self, group: TensorGroup, stage: int, found: Value) -> Sequence[Tensor]:
        """Return the importance of the only expert's changes."""
        del stage, found
        return [importance(group)]

    def ranks(self, stage: int, counts: Tensor, positive: Tensor) -> Tensor:
        """Return the quartiles' places from the top, [1, 3]."""
        del stage, positive
        size = int(counts[0])
        return torch.tensor(
            [[max(0, size - int(q * (size - 1))) if size else 0 for q in _QUANTILES]]
        )

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `quartiles`, [3], float64."""
        return {"quartiles": key_value(super().value(done, name, numel)["key"])}
