"""What data tell the bound: losses of experts, base, average and early checkpoints, curvature.

Without labels each expert's own answers (its probabilities) stand for them: its loss is then its
entropy, and the curvature is that of the divergence from it. Shapes: n answers, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from mergewell.advise.bound import Evidence
from mergewell.advise.settings import Sourced
from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError, ModelError
from mergewell.models.barrier import IGNORED
from mergewell.models.dataflow import Batch, evaluating, tensors
from mergewell.models.gradients import Lesson, gradient_products
from mergewell.models.loader import load_state

GRADIENTS = 8
"""Samples of each expert whose gradients are taken, one by one."""

State = Mapping[str, Tensor]
OnStep = Callable[[str, int, int], None]
"""Called with the step's name, what is done of it and what there is to do."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Losses in nats on each expert's own inputs, one entry an expert."""

    own: Sequence[float]
    base: Sequence[float]
    merged: Sequence[float]
    early: Sequence[Mapping[int, float]]
    """Of earlier checkpoints, by step."""
    gradients: Sequence[float] | None
    """Mean squared gradient norm of one sample; None without labels."""
    source: str


def measure(
    tasks: Sequence[LearningTask],
    experts: Sequence[State],
    base: State,
    merged: State,
    early: Sequence[Mapping[int, State]],
    factory: Callable[[], nn.Module],
    *,
    on_step: OnStep | None = None,
) -> Measured:
    """Return the losses of all models on every expert's task; a task of no expert is everyone's.

    Raises:
        DataError: an expert has no inputs.
        ModelError: outputs that are not finite.
    """
    module = factory()
    own: list[float] = []
    below: list[float] = []
    together: list[float] = []
    earlier: list[dict[int, float]] = []
    gradients: list[float] = []
    labelled = all(task.labels for task in tasks)
    for place, expert in enumerate(experts):
        mine = [task for task in tasks if task.expert in (None, place)]
        if not mine or not all(task.batches for task in mine):
            raise DataError(f"Expert {place + 1} has no inputs; name data for each expert.")
        load_state(module, expert)
        targets = _targets(module, mine, labelled)
        own.append(_loss(module, mine, targets))
        if labelled:
            gradients.append(_squared_gradient(module, mine))
        for state, into in ((base, below), (merged, together)):
            load_state(module, state)
            into.append(_loss(module, mine, targets))
        steps: dict[int, float] = {}
        for step, state in early[place].items():
            load_state(module, state)
            steps[step] = _loss(module, mine, targets)
        earlier.append(steps)
        if on_step is not None:
            on_step("losses", place + 1, len(experts))
    source = "labelled inputs" if labelled else "unlabelled inputs (the expert's own answers)"
    return Measured(own, below, together, earlier, gradients if labelled else None, source)


def informed(evidence: Evidence, measured: Measured | None) -> Evidence:
    """Return the evidence with losses and curvatures, of data or else of trainers' logs.

    L_i = 2 (f_i(x_0) - f_i(x_i)) / ||tau_i||^2, the curvature of a parabola whose lowest point is
    the expert. It is used if it is positive for every expert.
    """
    source, ends = _losses(evidence, measured)
    if ends is None:
        return evidence
    first, last = ends
    found = replace(evidence, losses=[Sourced(value, source) for value in last])
    if measured is not None:
        merged = [Sourced(value, source) for value in measured.merged]
        found = replace(found, merged=merged, gradients=measured.gradients)
    if evidence.products is None:
        return found
    squares = [float(one) for one in evidence.products.diagonal()[1:]]
    falls = [a - b for a, b in zip(first, last, strict=True)]
    if min(falls) <= 0 or min(squares) <= 0:
        return found
    pairs = zip(falls, squares, strict=True)
    return replace(found, curvatures=[Sourced(2 * fall / size, source) for fall, size in pairs])


def _losses(
    evidence: Evidence, measured: Measured | None
) -> tuple[str, tuple[Sequence[float], Sequence[float]] | None]:
    """Return the losses of the base and of the experts, or None where they are not known."""
    if measured is not None:
        return measured.source, (measured.base, measured.own)
    logged = [(one.value("start_loss"), one.value("loss")) for one in evidence.known]
    first = [a for a, b in logged if a is not None and b is not None]
    last = [b for a, b in logged if a is not None and b is not None]
    if len(first) < len(evidence.known) or not first:
        return "", None
    return f"training loss in {evidence.known[0].numbers['loss'].source}", (first, last)


def _targets(
    module: nn.Module, tasks: Sequence[LearningTask], labelled: bool
) -> list[list[Tensor]]:
    """Return the right answers [n] of every batch, or the module's own probabilities [n, C]."""
    if labelled:
        return [[labels.flatten() for labels in task.labels] for task in tasks]
    with evaluating([module]), torch.no_grad():
        return [[task.logits(module, b).softmax(-1) for b in task.batches] for task in tasks]


def _loss(
    module: nn.Module, tasks: Sequence[LearningTask], targets: Sequence[Sequence[Tensor]]
) -> float:
    """Return the mean cross-entropy over all answers that are judged, nats."""
    total, count = 0.0, 0
    with evaluating([module]), torch.no_grad():
        for task, answers in zip(tasks, targets, strict=True):
            for batch, answer in zip(task.batches, answers, strict=True):
                logits = task.logits(module, batch)
                logs = logits.float().log_softmax(-1).flatten(0, -2)
                if answer.is_floating_point():
                    total -= float((answer.flatten(0, -2) * logs).sum())
                    count += len(logs)
                    continue
                if len(answer) != len(logs):
                    raise DataError(
                        f"{len(answer)} labels stand beside {len(logs)} answers of the model; give "
                        "one label for each answer, or none at all."
                    )
                judged = answer != IGNORED
                if bool(judged.any()) and int(answer[judged].max()) >= logs.shape[-1]:
                    raise DataError(
                        f"A label is {int(answer[judged].max())}, but the model has "
                        f"{logs.shape[-1]} classes; give the labels of this model's head."
                    )
                total -= float(logs[judged].gather(1, answer[judged][:, None]).sum())
                count += int(judged.sum())
    if not count:
        raise DataError("No label is to be judged; give some that are not -100.")
    if not total < float("inf"):
        raise ModelError("A model's outputs are not finite; check its weights.")
    return total / count


def _squared_gradient(module: nn.Module, tasks: Sequence[LearningTask]) -> float:
    """Return the mean squared norm of the gradients of a few single samples."""
    lessons = list(islice((one for task in tasks for one in _samples(task)), GRADIENTS))
    products = gradient_products(module, lessons, at="expert").products.values()
    return float(torch.stack([each.diagonal().mean() for each in products]).sum())


def _samples(task: LearningTask) -> list[Lesson]:
    """Return a lesson for each of the first samples of a task."""
    found: list[Lesson] = []
    for batch, labels in zip(task.batches, task.labels, strict=True):
        for row in range(min(GRADIENTS - len(found), len(tensors(batch)[0]))):
            one = labels[row : row + 1]
            if bool((one != IGNORED).any()):
                found.append(Lesson(f"sample {row}", [_row(batch, row)], [one], task.head))
    return found


def _row(batch: Batch, row: int) -> Batch:
    if isinstance(batch, Tensor):
        return batch[row : row + 1]
    return {name: tensor[row : row + 1] for name, tensor in batch.items()}
