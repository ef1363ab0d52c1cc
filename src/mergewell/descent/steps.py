"""Steps: gradient descent on the coefficients of a merge, by Adam or with adaptive SAM.

Shapes: G groups of tensors, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergewell.descent.merge import LearnedMerge
from mergewell.descent.tasks import Aim, LearningTask, Targets, loss
from mergewell.models.dataflow import evaluating
from mergewell.models.gradients import differentiable

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Descent:
    """How the coefficients go down: Adam, with a sharpness radius for adaptive SAM."""

    steps: int
    rate: float
    decay: float = 0.0
    """Weight decay, as Adam adds it to the gradient."""

    radius: float = 0.0
    """Adaptive SAM's rho; 0 is plain descent."""

    temperature: float = 1.0
    """Of the targets and the merged model's logits."""

    leaf_rate: float | None = None
    """Learning rate of what an adjustment learns; `rate` when absent."""

    beside_rate: float | None = None
    """Learning rate of the parameters beside the merge; `rate` when absent."""

    coefficients: bool = True
    """Whether the coefficients move, or the rest alone."""


def descend(
    merge: LearnedMerge,
    tasks: Sequence[LearningTask],
    targets: Targets,
    aim: Aim,
    how: Descent,
    *,
    beside: Sequence[nn.Parameter] = (),
    on_step: OnStep | None = None,
) -> list[float]:
    """Learn the merge's coefficients in place and return the loss before each step.

    Each step takes one batch of every task in turn; the loss is the mean over the tasks. `beside`
    are parameters, of heads and the like, that are learned with the coefficients; so are the
    merge's own leaves, if it has an adjustment. SAM perturbs the coefficients alone.

    Source: Adam, Kingma and Ba 2015; adaptive SAM, Kwon et al. 2021, arXiv:2102.11600, equation 7.
    """
    groups = [
        {"params": held, "lr": how.rate if rate is None else rate}
        for held, rate in (
            ([merge.coefficients] if how.coefficients else [], None),
            ([*beside], how.beside_rate),
            ([*merge.leaves.values()], how.leaf_rate),
        )
        if held
    ]
    optimiser = torch.optim.Adam(groups, weight_decay=how.decay)
    losses: list[float] = []
    asked = [*merge.weights, *beside]
    with evaluating([merge.module]), differentiable(merge.module, asked):
        for step in range(how.steps):
            found, gradient = _gradient(merge, tasks, targets, aim, how.temperature, step, beside)
            if how.radius:
                start = merge.coefficients.detach().clone()
                _move(merge, start + _ascent(start, gradient, how.radius))
                _, gradient = _gradient(merge, tasks, targets, aim, how.temperature, step, beside)
                _move(merge, start)
            merge.coefficients.grad = gradient
            optimiser.step()
            merge.place()
            losses.append(found)
            if on_step is not None:
                on_step("steps", step + 1, how.steps)
    merge.coefficients.grad = None
    return losses


def mean_loss(
    merge: LearnedMerge, tasks: Sequence[LearningTask], targets: Targets, aim: Aim
) -> float:
    """Return the mean over the tasks of the mean loss of their batches, without gradients."""
    total = 0.0
    with evaluating([merge.module]):
        for task, aims in zip(tasks, targets, strict=True):
            for batch, target in zip(task.batches, aims, strict=True):
                part = loss(aim, task.logits(merge.module, batch), target)
                total += float(part) / (len(task.batches) * len(tasks))
    return total


def _gradient(
    merge: LearnedMerge,
    tasks: Sequence[LearningTask],
    targets: Targets,
    aim: Aim,
    temperature: float,
    step: int,
    beside: Sequence[nn.Parameter],
) -> tuple[float, Tensor]:
    """Return the mean loss over the tasks and the coefficients' gradient, [G, K]."""
    weights = merge.weights
    before = [weight.grad for weight in weights]
    for parameter in (*weights, *beside):
        parameter.grad = None
    total = 0.0
    try:
        with torch.enable_grad():
            for task, aims in zip(tasks, targets, strict=True):
                index = step % len(task.batches)
                logits = task.logits(merge.module, task.batches[index])
                part = loss(aim, logits, aims[index], temperature=temperature) / len(tasks)
                torch.autograd.backward([part])
                total += float(part.detach())
        return total, merge.gradient()
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.grad = old


def _ascent(coefficients: Tensor, gradient: Tensor, radius: float) -> Tensor:
    """Return adaptive SAM's step uphill: rho c^2 g / || |c| g ||, nothing where that is 0."""
    norm = (coefficients * gradient).square().sum().sqrt()
    if float(norm) == 0.0:
        return torch.zeros_like(coefficients)
    return radius * coefficients.square() * gradient / norm


def _move(merge: LearnedMerge, coefficients: Tensor) -> None:
    with torch.no_grad():
        merge.coefficients.copy_(coefficients)
    merge.place()
