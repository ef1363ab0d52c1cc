"""One module's merge with a coefficient for every element, fitted to what the experts gave there.

theta = base + sum_k lambda_k * tau_k, element by element.
Shapes: K experts, n samples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergewell.distil.outputs import first, fresh, unpadded
from mergewell.guidance import parameter_name
from mergewell.models.dataflow import Batch, evaluating
from mergewell.models.gradients import differentiable
from mergewell.models.walk import Call
from mergewell.plan import Plan


@dataclass(frozen=True, slots=True)
class Grown:
    """A parameter's base and task vectors."""

    base: Tensor
    task_vectors: Tensor
    """[K, *shape]."""

    def at(self, coefficients: Tensor) -> Tensor:
        """Return the merge with coefficients [K, *shape]."""
        return self.base + (coefficients * self.task_vectors).sum(0)


@dataclass(frozen=True, slots=True)
class Fitted:
    """What was found for a module."""

    weights: Mapping[str, Tensor]
    before: float
    """Squared distance to the experts' outputs with the coefficients at the start."""
    after: float
    energy: float
    """Sum of squares of the experts' outputs."""


def fit(
    module: nn.Module,
    grown: Mapping[str, Grown],
    calls: Mapping[int, Call],
    targets: Mapping[int, Tensor],
    batches: Sequence[Batch],
    owners: Sequence[int],
    *,
    start: float,
    epochs: int,
    rate: float,
) -> Fitted:
    """Return the parameters (those in `grown`) that bring the module near to its targets.

    Minimises sum_t ||module(z) - target||^2 / (2 T n), one batch of every task a step, by Adam.
    Where that does not bring it nearer over all inputs, the start is what is returned.

    Source: Xu et al. 2025, "ProDistill", arXiv:2502.12706 (methods.md B5).
    """
    coefficients = {n: torch.full_like(g.task_vectors, start) for n, g in grown.items()}
    optimiser = torch.optim.Adam(coefficients.values(), lr=rate)
    tasks = [[i for i in calls if owners[i] == owner] for owner in sorted({*owners})]
    parameters = {n: p for n, p in module.named_parameters() if n in grown}
    for parameter in parameters.values():
        parameter.data = parameter.data.clone()  # the file's own memory is not written into

    def place() -> None:
        for name, parameter in parameters.items():
            parameter.copy_(grown[name].at(coefficients[name]))
            parameter.grad = None

    def distance(index: int) -> Tensor:
        args, kwargs = fresh(calls[index])
        given, wanted = first(module(*args, **kwargs), calls[index].module), targets[index]
        difference = unpadded(batches[index], given) - unpadded(batches[index], wanted)
        return difference.square().sum()

    with evaluating([module]), differentiable(module, parameters.values()):
        energy = sum(float(unpadded(batches[i], t).square().sum()) for i, t in targets.items())
        place()
        plain = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        before = sum(float(distance(index)) for index in calls)
        for step in range(epochs * max(map(len, tasks))):
            for numbers in tasks:
                index = numbers[step % len(numbers)]
                with torch.enable_grad():
                    share = 2 * len(tasks) * max(1, len(targets[index]))
                    torch.autograd.backward([distance(index) / share])
            # the chain rule is cut at the weights: no graph holds the task vectors
            for name, parameter in parameters.items():
                back = parameter.grad
                given = None if back is None else back * grown[name].task_vectors
                coefficients[name].grad = given
            optimiser.step()
            place()
        after = sum(float(distance(index)) for index in calls)
    if not after < before:  # also where it is not finite
        return Fitted(plain, before, before, energy)
    found = {name: parameter.detach() for name, parameter in parameters.items()}
    return Fitted(found, before, after, energy)


def names_of(plan: Plan, place: str, module: nn.Module) -> dict[str, str]:
    """Return the checkpoint's names of a module's parameters that are learned, by its own names.

    Learned are those that an expert moved, but for those under a rule with a method of its own.
    """
    found: dict[str, str] = {}
    for own, _ in module.named_parameters():
        name = parameter_name(f"{place}.{own}" if place else own, plan.reference)
        if name is None or name not in plan.tasks or plan.tasks[name].copied_from is not None:
            continue
        rule = plan.recipe.rule_for(name)
        first_one, *others = plan.inputs
        moved = any(not torch.equal(first_one[name], other[name]) for other in others)
        if moved and (rule is None or rule.method is None):
            found[own] = name
    return found


def grown(plan: Plan, name: str) -> Grown:
    """Return a tensor's base and task vectors, in float32."""
    base = plan.reference[name].to(torch.float32)
    return Grown(
        base, torch.stack([expert[name].to(torch.float32) - base for expert in plan.experts])
    )
