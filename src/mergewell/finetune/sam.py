"""Sharpness-aware minimisation: the gradient from the worst place nearby, for any optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mergewell.errors import ModelError
from mergewell.finetune.base import at_least_zero, trained


class Sam:
    """Leaves grad L(theta + e) in `.grad`, with e = radius * g / ||g|| and g = grad L(theta).

    In a loop: `optimizer.zero_grad(); sam.backward(lambda: loss(module)); optimizer.step()`.
    With `adaptive`, e = radius * theta^2 g / || |theta| g ||, which does not change with the scale
    of the weights.

    Source: Foret et al. 2021, arXiv:2010.01412, equation 2 and algorithm 1; adaptive: Kwon et al.
    2021, arXiv:2102.11600. Departures: two forward passes on the same batch, hence dropout and
    BatchNorm statistics see it twice; gradients are replaced, not accumulated, so that the loss
    must be that of the whole batch.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, radius: float = 0.05, adaptive: bool = False
    ) -> None:
        """Remember what is trained.

        Raises:
            ModelError: no parameter requires a gradient.
            RecipeError: a radius that is negative or not finite.
        """
        self.parameters = trained(parameters)
        self.radius = at_least_zero(radius, "The radius of SAM")
        self.adaptive = adaptive

    def backward(self, loss: Callable[[], Tensor]) -> Tensor:
        """Put SAM's gradients into `.grad`; return the loss at theta, without a graph.

        The parameters come back bitwise, also if the loss fails. Where the gradient vanishes
        nothing is worse nearby to first order, and the gradient is theta's own.

        Raises:
            ModelError: the loss is not finite.
        """
        before = [each.detach().clone() for each in self.parameters]
        here = self._into_gradients(loss)
        try:
            self._ascend(before)
            self._into_gradients(loss)
        finally:
            with torch.no_grad():
                for each, kept in zip(self.parameters, before, strict=True):
                    each.copy_(kept)
        return here

    def _into_gradients(self, loss: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            value = loss()
            if not bool(value.isfinite()):
                raise ModelError(
                    "The loss is not finite; lower the learning rate or SAM's radius, or look at "
                    "the batch."
                )
            found = torch.autograd.grad(value, self.parameters, allow_unused=True)
        for each, gradient in zip(self.parameters, found, strict=True):
            each.grad = gradient
        return value.detach()

    @torch.no_grad()
    def _ascend(self, before: list[Tensor]) -> None:
        scaled = [
            each.grad * kept.abs() if self.adaptive else each.grad
            for each, kept in zip(self.parameters, before, strict=True)
            if each.grad is not None
        ]
        norm = float(sum(float(part.square().sum()) for part in scaled)) ** 0.5
        if norm == 0:
            return
        for each, kept in zip(self.parameters, before, strict=True):
            if each.grad is not None:
                step = each.grad * kept.square() if self.adaptive else each.grad
                each.add_(step * (self.radius / norm))
