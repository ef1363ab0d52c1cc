"""Accuracy on labelled inputs, of any module that gives logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mergewell.errors import DataError
from mergewell.evaluation.base import Measure, Rows
from mergewell.labelled import LABELS, LabelledInputs, first_output
from mergewell.models.dataflow import call, evaluating


def accuracy_on(task: str, data: LabelledInputs, *, expert: int | None = None) -> Measure:
    """Return the measure of right answers, each example 1 or 0.

    Raises:
        DataError: the data have no labels.
    """
    if data.labels is None:
        raise DataError(
            f"{task} has no labels to evaluate by; add an entry `{LABELS}`, or name a --metric."
        )
    labels = data.labels_by_batch

    def rows(module: nn.Module) -> Rows:
        right: list[Tensor] = []
        with evaluating([module]):
            for batch, due in zip(data.batches, labels, strict=True):
                logits = first_output(module, call(module, batch))
                if logits.dim() != 2 or len(logits) != len(due):
                    raise DataError(
                        f"{type(module).__name__} makes {tuple(logits.shape)} of {len(due)} "
                        f"examples of {task}; accuracy needs one row of logits an example."
                    )
                if int(due.max()) >= logits.shape[1]:
                    raise DataError(
                        f"{task} has the label {int(due.max())}, but {type(module).__name__} knows "
                        f"{logits.shape[1]} classes; use data and models that belong together."
                    )
                right.append(logits.argmax(-1).cpu() == due)
        return np.asarray(torch.cat(right).double().numpy())

    return Measure(task, "accuracy", rows, expert=expert)
