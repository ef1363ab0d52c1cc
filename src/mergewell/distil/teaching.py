"""Teaching: all weights of one model descend towards what experts say of unlabelled inputs.

Shapes: K experts, N samples, C classes or nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mergewell.descent.tasks import LearningTask, loss, said
from mergewell.errors import ModelError
from mergewell.models.dataflow import evaluating
from mergewell.models.gradients import differentiable
from mergewell.models.loader import load_state, placed
from mergewell.plan import Plan

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Teaching:
    """How the weights go down."""

    aim: Literal["expert", "ensemble"]
    match: Literal["answers", "outputs"]
    steps: int
    rate: float
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Taught:
    """What was learned."""

    weights: Mapping[str, Tensor]
    """The whole model, by the checkpoint's names."""

    moved: int
    """Tensors that were learned."""

    before: float
    """Mean loss over all inputs, each task counting the same, at the start."""

    after: float
    """And at the end."""


def teach(
    plan: Plan,
    start: Mapping[str, Tensor],
    factory: Callable[[], nn.Module],
    tasks: Sequence[LearningTask],
    how: Teaching,
    *,
    on_step: OnStep | None = None,
) -> Taught:
    """Return the weights `start` after learning, in float32 where they moved, else as they were.

    Learned are the parameters that differ between the plan's models and are under no rule with a
    method of its own. Each expert is run once over what it teaches; the module runs in eval mode.

    Raises:
        DataError: as `said`.
        ModelError: nothing can be learned.
    """
    module = factory()
    load_state(module, start)
    learned = _learned(plan, module)
    wanted = _said(plan, factory, tasks, how)

    def distance(task: int, index: int) -> Tensor:
        return _distance(module, tasks[task], index, wanted[task][index], how)

    def mean() -> float:
        parts = [
            sum(float(distance(number, index)) for index in range(len(task.batches)))
            / len(task.batches)
            for number, task in enumerate(tasks)
        ]
        return sum(parts) / len(parts)

    optimiser = torch.optim.Adam(learned.values(), lr=how.rate)
    with evaluating([module]), differentiable(module, learned.values()):
        before = mean()
        for step in range(how.steps):
            optimiser.zero_grad()
            for number, task in enumerate(tasks):
                with torch.enable_grad():
                    part = distance(number, step % len(task.batches)) / len(tasks)
                    torch.autograd.backward([part])
            optimiser.step()
            if on_step is not None:
                on_step("steps", step + 1, how.steps)
        after = mean()
    weights = dict(start)
    for name, parameter in learned.items():
        found = parameter.detach()
        if not torch.equal(found, start[name].to(found.dtype)):
            weights[name] = found.clone()
    return Taught(weights, len(learned), before, after)


def _said(
    plan: Plan,
    factory: Callable[[], nn.Module],
    tasks: Sequence[LearningTask],
    how: Teaching,
) -> Sequence[Sequence[Tensor]]:
    """Return by task and batch the probabilities, or outputs, that are to be matched."""
    if how.match == "outputs":
        return said(how.aim, [replace(task, head=None) for task in tasks], plan, factory)
    found = said(how.aim, tasks, plan, factory)
    return [[(z / how.temperature).softmax(-1) for z in batches] for batches in found]


def _distance(
    module: nn.Module, task: LearningTask, index: int, target: Tensor, how: Teaching
) -> Tensor:
    if how.match == "answers":
        given = task.logits(module, task.batches[index])
        return loss(how.aim, given, target, temperature=how.temperature)
    given = replace(task, head=None).logits(module, task.batches[index])
    return (given - target).square().sum() / target.square().sum().clamp_min(1e-12)


def _learned(plan: Plan, module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's parameters that are learned, by the checkpoint's names."""
    found: dict[str, nn.Parameter] = {}
    for name, target in placed(module, list(plan.tasks)).items():
        task, rule = plan.tasks[name], plan.recipe.rule_for(name)
        fixed = task.copied_from is not None or (rule is not None and rule.method is not None)
        if fixed or not isinstance(target, nn.Parameter):
            continue
        first, *others = plan.inputs
        if any(not torch.equal(first[name], other[name]) for other in others):
            found[name] = target
    if not found:
        raise ModelError(
            "No parameter of the module differs between the models; check that the experts are "
            "not the base."
        )
    return found
