"""Weight-scope alignment: every layer's weights keep the mean and spread of a target.

Shapes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from mergewell.errors import ModelError, RecipeError
from mergewell.finetune.base import Penalty, at_least_zero


@dataclass(frozen=True, slots=True)
class Scope:
    """Mean and standard deviation (of the population) of one layer's weights."""

    mean: float
    deviation: float


class WeightScope(Penalty):
    """strength * sum over layers of KL( N(mu, sigma^2) || N(mu_t, sigma_t^2) ), in nats.

    mu and sigma are those of the layer's weights now, mu_t and sigma_t the target's: the start's,
    unless others are given (`fused` makes one target for experts that shall merge).

    Source: Xu et al. 2024, "Weight scope alignment", arXiv:2408.12237 (methods.md A7). Departures:
    the direction of the divergence and the strength could not be read there and are ours; only
    tensors of two or more dimensions count, as vectors (biases, norms) have no spread to speak of.
    """

    def __init__(
        self, module: nn.Module, *, strength: float, targets: Mapping[str, Scope] | None = None
    ) -> None:
        """Remember the target of each trained matrix or kernel of a module.

        Raises:
            ModelError: no such parameter requires a gradient.
            RecipeError: a strength that is negative, or a target that is missing or has no spread.
        """
        held = _matrices(module)
        self.strength = at_least_zero(strength, "The strength of weight-scope alignment")
        found = scopes_of(module) if targets is None else targets
        for name in held:
            if name not in found:
                raise RecipeError(f"The targets lack {name}; take them from `scopes_of` its model.")
            if found[name].deviation <= 0:
                raise RecipeError(
                    f"The target of {name} has no spread, so nothing can be aligned with it; "
                    "freeze the parameter or give another target."
                )
        self.names, self.parameters = tuple(held), tuple(held.values())
        self.targets = tuple(found[name] for name in held)

    def value(self) -> Tensor:
        """Return the penalty."""
        each = zip(self.parameters, self.targets, strict=True)
        return self.strength * torch.stack([_divergence(w, t) for w, t in each]).sum()


def scopes_of(module: nn.Module) -> dict[str, Scope]:
    """Return the scope of each trained matrix or kernel of a module, by its parameter's name.

    Raises:
        ModelError: no such parameter requires a gradient.
    """
    with torch.no_grad():
        return {
            name: Scope(float(each.mean()), float(each.std(correction=0)))
            for name, each in _matrices(module).items()
        }


def fused(experts: Sequence[Mapping[str, Scope]]) -> dict[str, Scope]:
    """Return one target for several models: the mean of means, the root mean square of spreads.

    Source: Weight Scope Fusion of arXiv:2408.12237; its formula could not be read, this is ours.

    Raises:
        RecipeError: no scopes, or scopes of other parameters.
    """
    if not experts:
        raise RecipeError("There are no scopes to fuse; give those of one model or more.")
    names = list(experts[0])
    for each in experts:
        if set(each) != set(names):
            odd = sorted(set(each) ^ set(names))[0]
            raise RecipeError(f"{odd} has a scope in one model only; fuse those of one shape.")
    return {
        name: Scope(
            sum(each[name].mean for each in experts) / len(experts),
            sqrt(sum(each[name].deviation ** 2 for each in experts) / len(experts)),
        )
        for name in names
    }


def _divergence(weight: Tensor, target: Scope) -> Tensor:
    mean, variance = weight.mean(), weight.var(correction=0)
    spread = target.deviation**2
    apart = (variance + (mean - target.mean).square()) / (2 * spread)
    return apart - 0.5 - 0.5 * (variance / spread).log()


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    found = {n: p for n, p in module.named_parameters() if p.requires_grad and p.dim() > 1}
    if not found:
        raise ModelError(
            "No matrix or kernel requires a gradient; unfreeze what shall be fine-tuned."
        )
    return found
