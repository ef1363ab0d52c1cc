"""What candidates are judged by: how far their outputs are from a reference, without labels.

Shapes: N inputs, C classes or features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mergewell.descent.tasks import LearningTask, said
from mergewell.errors import ModelError, RecipeError
from mergewell.models.dataflow import Batch, evaluating, tensors
from mergewell.plan import Plan

Reference = Literal["expert", "ensemble", "mix", "answers"]
"""Each input's own expert, the uniform mean of all experts' outputs, half of each, or that half
and half with 1 added to the loss of every answer that is not the own expert's."""

Outputs = Literal["logits", "features"]
"""Logits are compared by KL in nats, features by one minus the cosine."""

Losses = tuple[NDArray[np.float64], ...]
"""By task: the divergence of each input, [N]."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The references, made once, and what a module is held against them by."""

    tasks: Sequence[LearningTask]
    references: Sequence[Sequence[Tensor]]
    """By task and batch: probabilities, or features."""

    outputs: Outputs
    answers: Sequence[Sequence[Tensor]] | None = None
    """By task and batch: the own expert's answers, each of which counts 1 where it is not given."""

    def losses(self, module: nn.Module) -> Losses:
        """Return the divergence reference || module of every input, by task.

        Raises:
            ModelError: outputs that are not finite.
        """
        found: list[NDArray[np.float64]] = []
        with evaluating([module]), torch.no_grad():
            for place, (task, references) in enumerate(
                zip(self.tasks, self.references, strict=True)
            ):
                parts: list[Tensor] = []
                for index, (batch, reference) in enumerate(
                    zip(task.batches, references, strict=True)
                ):
                    output = task.logits(module, batch)
                    rows = self._rows(output, reference)
                    if self.answers is not None:
                        rows = rows + (output.argmax(-1) != self.answers[place][index])
                    parts.append(_by_input(rows, batch))
                found.append(torch.cat(parts).double().numpy())
        if not all(np.isfinite(values).all() for values in found):
            raise ModelError(
                "A candidate gives outputs that are not finite; check the experts' weights."
            )
        return tuple(found)

    def _rows(self, output: Tensor, reference: Tensor) -> Tensor:
        if self.outputs == "features":
            return 1 - functional.cosine_similarity(reference, output, dim=-1)
        logs = output.log_softmax(-1)
        return functional.kl_div(logs, reference, reduction="none").sum(-1)


def make_objective(
    reference: Reference,
    outputs: Outputs,
    tasks: Sequence[LearningTask],
    plan: Plan,
    factory: Callable[[], nn.Module],
) -> Objective:
    """Return the objective; each expert is run once for each reference that it is part of.

    Labels of the tasks are not looked at.

    Raises:
        DataError: no task, one without inputs, or of no expert where that is the reference.
        RecipeError: answers where outputs are features.
        UserError: as `load_state`.
    """
    if reference == "answers" and outputs == "features":
        raise RecipeError("Features give no answers; make the reference expert, ensemble or mix.")
    with torch.no_grad():
        both = reference in ("mix", "answers")
        names = ("ensemble", "expert") if both else (reference,)
        made = [
            said("expert" if name == "expert" else "ensemble", tasks, plan, factory)
            for name in names
        ]
        shaped = [
            [[z if outputs == "features" else z.softmax(-1) for z in task] for task in one]
            for one in made
        ]
        mixed = [
            [torch.stack(parts).mean(0) for parts in zip(*batches, strict=True)]
            for batches in zip(*shaped, strict=True)
        ]
        answers = [[z.argmax(-1) for z in task] for task in made[-1]]
    return Objective(tasks, mixed, outputs, answers if reference == "answers" else None)


def _by_input(rows: Tensor, batch: Batch) -> Tensor:
    """Return the mean of the rows of each input, [N]; an input has one, or one a position."""
    count = len(tensors(batch)[0])
    if len(rows) == count:
        return rows
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and int(mask.sum()) == len(rows):
        sizes = [int(size) for size in mask.sum(1)]
    else:
        sizes = [len(rows) // count] * count
    return torch.stack([part.mean() for part in torch.split(rows, sizes)])  # pyright: ignore
