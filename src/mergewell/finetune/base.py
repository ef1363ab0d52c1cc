"""A penalty on weights: added to a loss, or to the gradients that a loss left."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mergewell.errors import ModelError, RecipeError


class Penalty(ABC):
    """A function of the parameters that fine-tuning keeps small.

    In a loop of one's own either `(loss + penalty.value()).backward()`, or `loss.backward()`, then
    `penalty.add_gradient()`: the same gradients; the second holds no graph of the weights and
    stays out of a loss that is scaled for mixed precision (call it once gradients are unscaled).
    """

    parameters: Sequence[nn.Parameter]

    @abstractmethod
    def value(self) -> Tensor:
        """Return the penalty, a number that gradients flow through."""

    def add_gradient(self) -> None:
        """Add the penalty's gradient to `.grad` of every parameter that requires one."""
        moved = [each for each in self.parameters if each.requires_grad]
        with torch.enable_grad():
            found = torch.autograd.grad(self.value(), moved, allow_unused=True)
        gradients = cast("Sequence[Tensor | None]", found)
        for parameter, gradient in zip(moved, gradients, strict=True):
            if gradient is None:  # a penalty need not look at every parameter
                continue
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def trained(parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    """Return the parameters that require gradients.

    Raises:
        ModelError: there are none.
    """
    found = tuple(each for each in parameters if each.requires_grad)
    if not found:
        raise ModelError("No parameter requires a gradient; unfreeze what shall be fine-tuned.")
    return found


def at_least_zero(value: float, name: str) -> float:
    """Return a number that has to be finite and 0 or more.

    Raises:
        RecipeError: it is not.
    """
    if not 0 <= value < float("inf"):
        raise RecipeError(f"{name} is {value:g}; give a number that is 0 or more.")
    return value
