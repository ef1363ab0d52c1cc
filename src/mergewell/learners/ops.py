"""What learners share.

Shapes: K experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.calibration.data import kept
from mergewell.models.dataflow import Batch, call, evaluating
from mergewell.models.trace import trace
from mergewell.models.units import Unit

Judge = Callable[[tuple[int, ...]], float]
"""A number for a selection of experts by their places; higher is better."""


def best_first(scores: Sequence[float]) -> tuple[int, ...]:
    """Return the places of the scores from the highest down; equal ones in their order."""
    return tuple(sorted(range(len(scores)), key=lambda place: -scores[place]))


def greedy_selection(
    order: Sequence[int], judge: Judge, *, first: float
) -> tuple[tuple[int, ...], float]:
    """Return the experts that are kept, and the judgement of them together.

    Starts from the first in `order`, whose own score is `first`; each other is added if the
    judgement of the selection with it does not fall, and is never compared with itself.

    Source: Wortsman et al. 2022, arXiv:2203.05482, recipe 1 (greedy soup).
    """
    kept, best = (order[0],), first
    for candidate in order[1:]:
        score = judge((*kept, candidate))
        if score >= best:
            kept, best = (*kept, candidate), score
    return kept, best


@dataclass(frozen=True, slots=True)
class LayerFit:
    """A layer of every expert on one input, and what the merged layer should give there."""

    unit: Unit

    outputs: Sequence[Sequence[tuple[Tensor, ...]]]
    """By batch and expert, the pre-activations of the unit's branches."""

    targets: Sequence[Tensor]
    """By batch."""

    @property
    def energy(self) -> float:
        """Sum of the targets' squares."""
        return sum(float(target.square().sum()) for target in self.targets)

    def gap(self, shares: Tensor) -> Tensor:
        """Return the squared distance to the targets with coefficients `shares`, [K]."""
        total = torch.zeros((), dtype=torch.float64)
        for experts, target in zip(self.outputs, self.targets, strict=True):
            factors = [
                sum(
                    (s * z for s, z in zip(shares.to(target.dtype), branch, strict=True)),
                    0 * target,
                )
                for branch in zip(*experts, strict=True)
            ]
            total = total + (self.unit.function(*factors) - target).square().sum()
        return total

    def fitted(self, *, steps: int, rate: float, least_entropy: float) -> Tensor:
        """Return the shares, [K], float64, that least squares finds from equal ones by Adam."""
        count, energy = len(self.outputs[0]), self.energy or 1.0
        logits = torch.zeros(count, dtype=torch.float64, requires_grad=True)
        descent = torch.optim.Adam([logits], lr=rate)
        for _ in range(steps):
            descent.zero_grad()
            torch.autograd.backward([self.gap(logits.softmax(0)) / energy])
            descent.step()
        return kept_apart(logits.detach().softmax(0), least_entropy)


def layer_fits(
    module: nn.Module,
    experts: Sequence[nn.Module],
    batches: Sequence[Batch],
    owners: Sequence[int] | None = None,
) -> Iterator[LayerFit]:
    """Yield each pointwise unit's fit on what `module` feeds it; padding is left out.

    The targets are the experts' mean activations or, with `owners`, those of each batch's own.
    """
    units = trace(module, batches[0]).covered
    seen: dict[str, list[tuple[Any, Any]]] = {unit.name: [] for unit in units}
    with ExitStack() as hooks, torch.no_grad(), evaluating([module]):
        for unit in units:

            def hook(_: nn.Module, args: Any, kwargs: Any, name: str = unit.name) -> None:
                seen[name].append((args, kwargs))

            part = module.get_submodule(unit.module)
            hooks.callback(part.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            call(module, batch)
    for unit in units:
        with torch.no_grad(), evaluating(experts):
            outputs = [
                [_picked(unit, batch, unit.pre_activations(expert, *h)) for expert in experts]
                for h, batch in zip(seen.pop(unit.name), batches, strict=True)
            ]
            made = [[unit.function(*z) for z in sides] for sides in outputs]
            targets = [
                torch.stack(sides).mean(0) if owners is None else sides[owners[number]]
                for number, sides in enumerate(made)
            ]
        yield LayerFit(unit, outputs, targets)


def _picked(unit: Unit, batch: Batch, factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return pre-activations without those of padding."""
    mask = kept(batch, factors[0]) if unit.node_dim == -1 else None
    return factors if mask is None else tuple(z[mask] for z in factors)


def entropy(shares: Tensor) -> float:
    """Return the entropy of shares, [K], as a fraction of that of equal ones; 1 for K = 1."""
    positive = shares[shares > 0]
    whole = math.log(len(shares))
    return float(-(positive * positive.log()).sum()) / whole if whole else 1.0


def kept_apart(shares: Tensor, least_entropy: float) -> Tensor:
    """Return shares, [K], mixed with equal ones as far as the entropy asks for, and no further."""
    equal = torch.full_like(shares, 1 / len(shares))
    low, high = 0.0, 1.0
    if entropy(shares) >= least_entropy:
        return shares
    for _ in range(50):
        middle = (low + high) / 2
        enough = entropy(shares.lerp(equal, middle)) >= least_entropy
        low, high = (low, middle) if enough else (middle, high)
    return shares.lerp(equal, high)
