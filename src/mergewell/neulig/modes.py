"""Modes: which models are merged from a network of coefficients, and what that costs.

Shapes: N samples, K experts, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mergewell.neulig.portland import pooled
from mergewell.recipe import MethodChoice, Recipe

Mode = Literal["sample", "batch", "batch_mean", "task", "global", "static"]
"""Whose coefficients a merged model takes.

sample: each input's own. batch: those of a batch's first input, for all of it (the paper's code).
batch_mean: the mean over a batch. task: the mean over a task's learning inputs, one model a task.
global: the mean over all tasks, one model. static: one model whose coefficients were learned as
such, without a network.
"""

ROUTED: tuple[Mode, ...] = ("sample", "batch", "batch_mean", "task")
"""Modes that are a router: which weights answer depends on the input or its task."""


@dataclass(frozen=True, slots=True)
class Merges:
    """The coefficients of every merged model that answers N inputs, and which answers which."""

    coefficients: Tensor
    """[models, K], on the simplex."""

    owner: Tensor
    """[N], the model's number for each input."""


def coefficients_of(network: nn.Module, outputs: Tensor) -> Tensor:
    """Return a network's coefficients [N, K] for stored outputs [N, K, ..., D]."""
    with torch.no_grad():
        return network(pooled(outputs))


def merges(
    mode: Mode,
    seen: Sequence[Tensor],
    learned: Sequence[Tensor],
    place: int,
    *,
    batch: int = 128,
) -> Merges:
    """Return what answers the inputs of one task.

    `seen` are the coefficients [N, K] of the inputs to answer, by task, `learned` those of the
    inputs that the network was trained on, `place` the task.
    """
    mine = seen[place]
    one = torch.zeros(len(mine), dtype=torch.int64)
    if mode == "sample":
        return Merges(mine, torch.arange(len(mine)))
    if mode in ("batch", "batch_mean"):
        parts = [mine[start : start + batch] for start in range(0, len(mine), batch)]
        rows = [part[0] if mode == "batch" else part.mean(0) for part in parts]
        owner = torch.arange(len(mine)) // batch
        return Merges(torch.stack(rows), owner)
    if mode == "task":
        return Merges(learned[place].mean(0, keepdim=True), one)
    means = torch.stack([each.mean(0) for each in learned])
    return Merges(means.mean(0, keepdim=True), one)


def passes(mode: Mode, experts: int) -> int:
    """Return the encoder passes that an answer costs: all experts ask for the coefficients."""
    return experts + 1 if mode in ("sample", "batch", "batch_mean") else 1


def entropy(coefficients: Tensor) -> float:
    """Return the mean entropy of coefficients [.., K] as a fraction of log K; 0 is one-hot."""
    count = coefficients.shape[-1]
    if count == 1:
        return 1.0
    shares = coefficients.double()
    each = -(shares * shares.clamp_min(1e-300).log()).sum(-1)
    return float(each.mean()) / math.log(count)


def described(mode: Mode, coefficients: Tensor) -> str:
    """Return in one sentence what kind of model this is."""
    spread = entropy(coefficients)
    hot = " and chooses nearly a single expert" if spread < 0.1 else ""
    if mode in ROUTED:
        what = "task" if mode == "task" else "input"
        return (
            f"Mode {mode} is a router{hot}: which weights answer depends on the {what} (entropy of "
            f"the coefficients {spread:.2f} of log K)."
        )
    return (
        f"Mode {mode} is one merged model{hot} (entropy of the coefficients {spread:.2f} of log K)."
    )


def recipe_of(recipe: Recipe, coefficients: Tensor) -> Recipe:
    """Return the recipe of theta = sum_j b_j theta_j for coefficients [K]."""
    experts = [
        expert.model_copy(update={"coefficient": float(share)})
        for expert, share in zip(recipe.experts, coefficients, strict=True)
    ]
    return recipe.model_copy(
        update={"experts": (*experts,), "method": MethodChoice(name="average")}
    )
