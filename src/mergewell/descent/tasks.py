"""Tasks to learn on, and what the merged model is to say about their inputs.

Shapes: n samples of a batch, L positions, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergewell.errors import DataError
from mergewell.models.barrier import IGNORED, Head, first_output
from mergewell.models.dataflow import Batch, evaluating, tensors
from mergewell.models.loader import load_state
from mergewell.plan import Plan

Aim = Literal["entropy", "expert", "ensemble", "labels"]
"""What is learned from: the merged model's own certainty, the task's expert, all of them, labels.
"""


@dataclass(frozen=True, slots=True)
class LearningTask:
    """Inputs of one task, the head that reads the features there, and whose task it is."""

    expert: int | None
    """Which expert of the recipe, from 0, was fine-tuned for it; None where that is not known."""

    batches: Sequence[Batch]
    """Inputs; each step takes one, in turn."""

    labels: Sequence[Tensor] = ()
    """Right answers by batch, int64 [n] or [n, L], -100 where nothing is judged; or none."""

    head: Head | None = None
    """From the module's first output to logits; none where these are the logits."""

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of a batch, one row [C] for each answer; padding is left out."""
        return self.read(first_output(module, batch), batch)

    def read(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the logits that a module's first output for a batch gives, as `logits`."""
        logits = self.head(output) if self.head is not None else output
        if logits.dim() < 3:
            return logits
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        fits = mask is not None and mask.shape == logits.shape[:-1]
        return logits[mask.bool()] if mask is not None and fits else logits.flatten(0, -2)


def by_input(rows: Tensor, batch: Batch) -> Tensor:
    """Return the mean of each input's rows, [n] or [n, C]; it has one, or one a position."""
    count = len(tensors(batch)[0])
    if len(rows) == count:
        return rows
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and int(mask.sum()) == len(rows):
        sizes = [int(size) for size in mask.sum(1)]
    else:
        sizes = [len(rows) // count] * count
    return torch.stack([part.mean(0) for part in torch.split(rows, sizes)])  # pyright: ignore


Targets = Sequence[Sequence[Tensor | None]]
"""By task and batch: probabilities [.., C], labels [..], or nothing for entropy."""


def targets(
    aim: Aim,
    tasks: Sequence[LearningTask],
    plan: Plan,
    factory: Callable[[], nn.Module],
    *,
    temperature: float = 1.0,
) -> Targets:
    """Return what the merged model is to say; each expert is run once over what it teaches.

    Raises:
        DataError: no task, a task without inputs, of no expert, or without labels where they are
            the aim.
        UserError: as `load_state`.
    """
    _check(aim, tasks, len(plan.experts))
    if aim == "entropy":
        return [[None for _ in task.batches] for task in tasks]
    if aim == "labels":
        return [[_unmasked(task, index) for index in range(len(task.batches))] for task in tasks]
    found = said(aim, tasks, plan, factory)
    return [[(z / temperature).softmax(-1) for z in batches] for batches in found]


def said(
    aim: Literal["expert", "ensemble"],
    tasks: Sequence[LearningTask],
    plan: Plan,
    factory: Callable[[], nn.Module],
) -> list[list[Tensor]]:
    """Return the logits of each task's expert, or the mean of all experts', by task and batch.

    Raises:
        DataError: as `targets`.
        UserError: as `load_state`.
    """
    _check(aim, tasks, len(plan.experts))
    found: dict[tuple[int, int], Tensor] = {}
    module = factory()
    for number, expert in enumerate(plan.experts):
        taught = [t for t, task in enumerate(tasks) if aim == "ensemble" or task.expert == number]
        if not taught:
            continue
        load_state(module, {name: expert[name] for name in expert})
        with evaluating([module]):
            for place in taught:
                for index, batch in enumerate(tasks[place].batches):
                    part = tasks[place].logits(module, batch)
                    share = len(plan.experts) if aim == "ensemble" else 1
                    found[place, index] = part / share + found.get((place, index), 0)
    return [[found[t, i] for i in range(len(task.batches))] for t, task in enumerate(tasks)]


def loss(aim: Aim, logits: Tensor, target: Tensor | None, *, temperature: float = 1.0) -> Tensor:
    """Return the mean loss of a batch's logits [.., C], in nats.

    entropy: H(p). expert, ensemble: KL(target || p) at the temperature. labels: cross-entropy.
    """
    if target is None:
        logs = logits.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1).mean()
    if aim == "labels":
        return functional.cross_entropy(logits, target, ignore_index=IGNORED)
    logs = (logits / temperature).log_softmax(-1)
    return functional.kl_div(logs, target, reduction="batchmean")


def _unmasked(task: LearningTask, index: int) -> Tensor:
    """Return a batch's labels, one for each row of `LearningTask.logits`."""
    batch, labels = task.batches[index], task.labels[index]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if labels.dim() > 1 and mask is not None and mask.shape == labels.shape:
        return labels[mask.bool()]
    return labels.flatten()


def _check(aim: Aim, tasks: Sequence[LearningTask], experts: int) -> None:
    if not tasks:
        raise DataError("Coefficients are learned from inputs of the experts' tasks; give some.")
    for number, task in enumerate(tasks, 1):
        if not task.batches:
            raise DataError(f"Task {number} has no inputs; give some.")
        if task.expert is None and aim == "expert":
            raise DataError(
                "What each task's expert says is to be learned, but not whose the inputs are; give "
                "inputs for each expert by itself."
            )
        if task.expert is not None and not 0 <= task.expert < experts:
            raise DataError(
                f"Task {number} is said to be of expert {task.expert + 1} but there are {experts}; "
                "name the inputs in the order of the experts."
            )
        if aim == "labels" and len(task.labels) != len(task.batches):
            raise DataError(
                f"Task {number} has labels for {len(task.labels)} of {len(task.batches)} batches; "
                "give them all, or learn without labels."
            )
