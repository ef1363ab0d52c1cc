"""L2-SP: the penalty that draws fine-tuning back to where it started."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mergewell.finetune.base import Penalty, at_least_zero, trained


class L2SP(Penalty):
    """strength / 2 * ||theta - theta_0||^2, with theta_0 the parameters as they were given.

    Source: Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning",
    arXiv:1802.01483, equation 2. Departures: new heads have no start worth a pull; leave them out
    of `parameters` and give them ordinary weight decay. It is a term of the loss, so that an
    adaptive optimiser (AdamW) rescales it like the loss.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, strength: float) -> None:
        """Remember where the parameters start.

        Raises:
            ModelError: none requires a gradient.
            RecipeError: a strength that is negative or not finite.
        """
        self.parameters = trained(parameters)
        self.strength = at_least_zero(strength, "The strength of L2-SP")
        self.start = tuple(each.detach().clone() for each in self.parameters)

    def value(self) -> Tensor:
        """Return the penalty."""
        apart = zip(self.parameters, self.start, strict=True)
        squares = [(each - start).square().sum() for each, start in apart]
        return self.strength / 2 * torch.stack(squares).sum()

    def distance(self) -> float:
        """Return ||theta - theta_0||, the norm of the task vector so far."""
        with torch.no_grad():
            apart = zip(self.parameters, self.start, strict=True)
            return sum(float((each - start).square().sum()) for each, start in apart) ** 0.5

    def add_gradient(self) -> None:
        """Add strength * (theta - theta_0) to the gradients: the same, without a graph."""
        with torch.no_grad():
            for each, start in zip(self.parameters, self.start, strict=True):
                if each.grad is None:
                    each.grad = torch.zeros_like(each)
                each.grad.add_(each - start, alpha=self.strength)
