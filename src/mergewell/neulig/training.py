"""Training: Portland on the experts' stored embeddings, so that their ensemble is right.

Shapes: N samples of a task, K experts, D features, C classes, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergewell.descent.tasks import Aim, LearningTask, loss
from mergewell.errors import DataError
from mergewell.neulig.offsets import Offsets, Penalty
from mergewell.neulig.portland import OnStep, pooled


@dataclass(frozen=True, slots=True)
class Training:
    """How the coefficients' network is trained."""

    aim: Aim = "expert"
    """labels: the paper's "sup". entropy: its "semi". expert: KL to the task's expert, ours."""

    penalty: Penalty = "scalar"
    share: float = 0.01
    """Weight of the penalty beside the loss; the released code divides it by 100."""

    epochs: int = 200
    batch: int = 128
    rate: float = 1e-3
    seed: int = 0


def train(
    network: nn.Module,
    outputs: Sequence[Tensor],
    tasks: Sequence[LearningTask],
    offsets: Offsets,
    how: Training,
    *,
    on_step: OnStep | None = None,
) -> list[float]:
    """Train a network of coefficients in place; return the mean loss of each epoch.

    `outputs` are what the experts made of the tasks' inputs, T tensors [N, K, ..., D]. The
    experts are not run again: the ensemble is the head's answer to sum_j b_j z_j, and one step is
    made for a batch of one task after the other, as in the paper's code.

    Raises:
        DataError: each task's expert is to be followed, but whose a task is is not known.
    """
    generator = torch.Generator().manual_seed(how.seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=how.rate)
    goals = [_goals(seen, task, how.aim) for seen, task in zip(outputs, tasks, strict=True)]
    history: list[float] = []
    for epoch in range(how.epochs):
        orders = [torch.randperm(len(seen), generator=generator) for seen in outputs]
        rounds = max(1, min(len(order) for order in orders) // how.batch)
        total = 0.0
        for turn in range(rounds):
            for seen, task, goal, order in zip(outputs, tasks, goals, orders, strict=True):
                rows = order[turn * how.batch : (turn + 1) * how.batch]
                coefficients = network(pooled(seen[rows]))
                logits = ensemble_logits(seen[rows], coefficients, task)
                part = loss(how.aim, logits, None if goal is None else goal[rows])
                part = part + how.share * offsets.penalty(how.penalty, coefficients).mean()
                optimiser.zero_grad()
                torch.autograd.backward([part])
                optimiser.step()
                total += float(part.detach())
        history.append(total / (rounds * len(tasks)))
        if on_step is not None:
            on_step("epochs", epoch + 1, how.epochs)
    return history


def ensemble_logits(outputs: Tensor, coefficients: Tensor, task: LearningTask) -> Tensor:
    """Return the head's answers to the coefficients' mean of outputs [N, K, ..., D].

    coefficients: [N, K], or [K] for all samples.
    """
    shares = coefficients.expand(len(outputs), -1) if coefficients.dim() == 1 else coefficients
    mean = torch.einsum("nk,nk...d->n...d", shares.to(outputs.dtype), outputs)
    return mean if task.head is None else task.head(mean)


def _goals(outputs: Tensor, task: LearningTask, aim: Aim) -> Tensor | None:
    """Return what each sample is taught: labels [N], probabilities [N, C], or nothing."""
    if aim == "entropy":
        return None
    if aim == "labels":
        return torch.cat([*task.labels])
    if aim == "ensemble":
        count = outputs.shape[1]
        said = ensemble_logits(outputs, torch.full((count,), 1 / count), task)
    else:
        if task.expert is None:
            raise DataError(
                "What each task's expert says is to be learned, but not whose the inputs are; give "
                "inputs for each expert by itself."
            )
        mine = outputs[:, task.expert]
        said = mine if task.head is None else task.head(mine)
    return said.detach().softmax(-1)
