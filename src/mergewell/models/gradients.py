"""Gradients of the experts' losses at one point: do their tasks pull it the same way?

Shapes: K experts, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergewell.errors import DataError, ModelError
from mergewell.models.barrier import (
    IGNORED,
    Answers,
    Head,
    first_output,
    pseudo_labels,
    summed_loss,
)
from mergewell.models.dataflow import Batch, evaluating


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one expert would teach: batches and the right answers to them."""

    expert: str
    batches: Sequence[Batch]
    labels: Sequence[Tensor]
    """Answers for each batch, int64 [n] or [n, T], -100 where nothing is judged."""

    head: Head | None = None
    """From the module's first output to logits; none where these are the logits."""

    answers: Answers = "labels"


@dataclass(frozen=True, slots=True)
class Gradients:
    """Inner products of the gradients of K lessons' mean losses, at one point."""

    at: str
    """The point: "base" or "merged"."""

    experts: tuple[str, ...]
    products: Mapping[str, Tensor]
    """By parameter, [K, K], float64."""

    samples: tuple[int, ...]
    """Answers that each gradient is the mean of."""

    answers: Answers


def gradient_products(
    module: nn.Module,
    lessons: Sequence[Lesson],
    *,
    at: str,
    wanted: Callable[[str], bool] | None = None,
) -> Gradients:
    """Return the inner products of the lessons' gradients at the weights that a module holds.

    The module runs in eval mode and comes back as it was, its `.grad` fields untouched. K gradients
    are held in the parameters' dtype: `wanted` (a test of a parameter's name) bounds the memory.

    Source: methods.md C9 (arXiv:2601.22285). Departures: at one common point (the base or the
    merged model) and not each at its own expert, so that the gradients can be compared.
    Raises:
        DataError: a lesson without answers, or labels that do not fit.
        ModelError: no parameter is wanted.
    """
    parameters = {
        name: parameter
        for name, parameter in module.named_parameters()
        if wanted is None or wanted(name)
    }
    if not parameters:
        raise ModelError(
            f"{type(module).__name__} has no parameter that is wanted; widen the choice."
        )
    with evaluating([module]), torch.enable_grad(), differentiable(module, parameters.values()):
        seen = [_gradient(module, parameters, lesson) for lesson in lessons]
    products = {
        name: _products([gradient[i] for gradient, _ in seen]) for i, name in enumerate(parameters)
    }
    return Gradients(
        at,
        tuple(lesson.expert for lesson in lessons),
        products,
        tuple(count for _, count in seen),
        "labels" if all(lesson.answers == "labels" for lesson in lessons) else "pseudo-labels",
    )


def own_answers(
    module: nn.Module, expert: str, batches: Sequence[Batch], head: Head | None = None
) -> Lesson:
    """Return what an expert teaches without labels: its own answers to unlabelled batches."""
    with evaluating([module]):
        outputs = [first_output(module, batch) for batch in batches]
    logits = [head(output) for output in outputs] if head is not None else outputs
    labels = [pseudo_labels(each, batch) for each, batch in zip(logits, batches, strict=True)]
    return Lesson(expert, batches, labels, head, "pseudo-labels")


def _gradient(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], lesson: Lesson
) -> tuple[list[Tensor], int]:
    """Return the gradient of a lesson's mean loss, a tensor a parameter, and the answers judged."""
    count = sum(int((labels != IGNORED).sum()) for labels in lesson.labels)
    if count == 0 or len(lesson.labels) != len(lesson.batches):
        raise DataError(
            f"{lesson.expert}: {len(lesson.batches)} batches have {len(lesson.labels)} batches of "
            f"labels with {count} to be judged; give labels for every batch."
        )
    total = [torch.zeros_like(parameter) for parameter in parameters.values()]
    for batch, labels in zip(lesson.batches, lesson.labels, strict=True):
        output = first_output(module, batch)
        logits = lesson.head(output) if lesson.head is not None else output
        loss = summed_loss(logits, labels) / count
        found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        for part, gradient in zip(total, found, strict=True):
            part += gradient
    return total, count


def _products(gradients: Sequence[Tensor]) -> Tensor:
    """Return inner products [K, K] in float64, of float32 gradients of one parameter."""
    flat = [gradient.flatten().double() for gradient in gradients]
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for i, left in enumerate(flat):
        for j, right in enumerate(flat[: i + 1]):
            products[i, j] = products[j, i] = torch.dot(left, right)
    return products


@contextmanager
def differentiable(
    module: nn.Module, parameters: Iterable[nn.Parameter]
) -> Generator[None, None, None]:
    """Let gradients flow to these parameters alone, then restore what was asked for before."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, asked in before:
            parameter.requires_grad_(asked)
