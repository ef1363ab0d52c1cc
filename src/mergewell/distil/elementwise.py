"""One module's merge with a coefficient for every element, fitted to what the experts gave there.

theta = base + sum_k lambda_k * tau_k, element by element.
Shapes: K experts, n samples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from mergewell.distil.outputs import first, unpadded
from mergewell.guidance import parameter_name
from mergewell.models.dataflow import Batch, evaluating
from mergewell.models.walk import Call
from mergewell.plan import Plan


@dataclass(frozen=True, slots=True)
class Grown:
    """A parameter's base and task vectors."""

    base: Tensor
    task_vectors: Tensor
    """[K, *shape]."""

    def at(self, coefficients: Tensor) -> Tensor:
        """Return the merge with coefficients [K, *shape], or [K] with ones after it."""
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
    leaves = {n: torch.full_like(g.task_vectors, start).requires_grad_() for n, g in grown.items()}
    optimiser = torch.optim.Adam(leaves.values(), lr=rate)
    tasks = [[i for i in calls if owners[i] == owner] for owner in sorted({*owners})]

    def weights() -> dict[str, Tensor]:
        return {name: grown[name].at(leaf) for name, leaf in leaves.items()}

    def distance(index: int, parameters: Mapping[str, Tensor]) -> Tensor:
        # a module may write into what it is given
        args, kwargs = tree_map_only(Tensor, torch.clone, (calls[index].args, calls[index].kwargs))
        given = first(functional_call(module, dict(parameters), args, kwargs), calls[index].module)
        wanted = targets[index]
        difference = unpadded(batches[index], given) - unpadded(batches[index], wanted)
        return difference.square().sum()

    def whole() -> float:
        parameters = weights()
        return sum(float(distance(index, parameters)) for index in calls)

    with evaluating([module]):
        energy = sum(float(unpadded(batches[i], t).square().sum()) for i, t in targets.items())
        plain, before = weights(), whole()
        for step in range(epochs * max(map(len, tasks))):
            optimiser.zero_grad()
            for numbers in tasks:
                index = numbers[step % len(numbers)]
                with torch.enable_grad():
                    share = 2 * len(tasks) * max(1, len(targets[index]))
                    torch.autograd.backward([distance(index, weights()) / share])
            optimiser.step()
        after = whole()
        if not after < before:  # also where it is not finite
            return Fitted(plain, before, before, energy)
        return Fitted(weights(), before, after, energy)


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
