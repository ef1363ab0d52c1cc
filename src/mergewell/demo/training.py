"""One small fine-tuning loop for experts that shall merge, whatever the network.

Besides plain AdamW it knows two levers that act on the *task vector* (expert minus base, where the
base is the module as it was handed in):

* `scales=(low, high)`: each step computes its loss at `base + s * task vector` with a random `s`,
  so that the expert still works when a merge scales its task vector down. The gradient is taken at
  the scaled point and applied to the task vector (times `s`, the chain rule).
* `pull`: L2-SP, a penalty `pull / 2 * ||task vector||^2` in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def schedule(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up to 1, then linear decay to 0 at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))


def fine_tune(
    module: nn.Module,
    loss_of_step: Callable[[nn.Module, int], Tensor],
    *,
    parameters: Iterable[nn.Parameter],
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    clip: float = 1.0,
    scales: tuple[float, float] = (1.0, 1.0),
    pull: float = 0.0,
    momentum: float | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train `parameters` of `module` in place on `loss_of_step(module, step)`.

    `module` keeps its train/eval mode. The optimiser is AdamW, or SGD where `momentum` is given;
    `weight_decay` is its own, towards zero. `clip` bounds the norm of the whole gradient. `seed`
    drives only the random scales. `on_step(step, loss)` is called after each step.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    base = [parameter.detach().clone() for parameter in trained]
    optimizer: torch.optim.Optimizer
    if momentum is None:
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.SGD(
            trained, lr=learning_rate, momentum=momentum, weight_decay=weight_decay
        )
    generator = torch.Generator().manual_seed(seed)
    low, high = scales
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps, warmup_steps)
        scale = low + (high - low) * float(torch.rand((), generator=generator))
        full = [parameter.detach().clone() for parameter in trained] if scale != 1.0 else []
        with torch.no_grad():
            for parameter, start in zip(trained, base, strict=True):
                if scale != 1.0:
                    parameter.lerp_(start, 1.0 - scale)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of_step(module, step)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        with torch.no_grad():
            for parameter, whole in zip(trained, full, strict=False):
                parameter.copy_(whole)
            for parameter, start in zip(trained, base, strict=True):
                if parameter.grad is None:
                    continue
                if scale != 1.0:
                    parameter.grad.mul_(scale)
                if pull:
                    parameter.grad.add_(parameter - start, alpha=pull)
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        if on_step is not None:
            on_step(step, float(loss.detach()))
