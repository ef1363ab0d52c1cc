"""The search: every candidate is merged, run on the inputs and held against the reference.

Candidates that differ in `scale` alone share one merge. Shapes: M candidates, R resamples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mergewell.errors import RecipeError
from mergewell.evaluate import Estimate, estimate, resampled_means
from mergewell.models.loader import load_state
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors
from mergewell.tune.objective import Losses, Objective
from mergewell.tune.space import Candidate

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate and the mean divergence of its merge, each task counting the same."""

    candidate: Candidate
    divergence: Estimate


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `tune` found."""

    recipe: Recipe
    tried: tuple[Tried, ...]
    """All candidates, the best first."""

    regret: float
    """Mean gain in divergence that the best candidate of a resample of the inputs has over the
    chosen one; it knows nothing of settings that were not tried."""


def tune(
    recipe: Recipe,
    tried: Sequence[Candidate],
    objective: Objective,
    factory: Callable[[], nn.Module],
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Tuned:
    """Return the recipe with the method of the smallest divergence, and what was tried.

    Raises:
        RecipeError: no base where scales are searched, or no candidate.
        UserError: as `make_plan`, `merge_tensors`, `load_state` and `Objective.losses`.
    """
    if not tried:
        raise RecipeError("There is no candidate to try; name a method.")
    found: dict[int, Losses] = {}
    for place, module in merged(recipe, tried, factory):
        found[place] = objective.losses(module)
        if on_step is not None:
            on_step("candidates", len(found), len(tried))
    losses = [found[place] for place in range(len(tried))]
    values = np.array([np.mean([task.mean() for task in one]) for one in losses])
    draws = np.mean(
        [
            resampled_means(np.stack(rows), seed=seed + place)
            for place, rows in enumerate(zip(*losses, strict=True))
        ],
        axis=0,
    )
    order = np.argsort(values, kind="stable")
    best = int(order[0])
    regret = float((draws[:, best] - draws.min(1)).mean())
    chosen = _with(recipe, tried[best])
    inputs = sum(len(task) for task in losses[0])
    note = (
        f"Chosen by `mergewell tune` without labels among {len(tried)} candidates on {inputs} "
        f"inputs: divergence {values[best]:.4g}, estimated regret {regret:.2g}."
    )
    return Tuned(
        chosen.model_copy(update={"notes": (*chosen.notes, note)}),
        tuple(Tried(tried[i], estimate(float(values[i]), draws[:, i])) for i in map(int, order)),
        regret,
    )


def merged(
    recipe: Recipe, tried: Sequence[Candidate], factory: Callable[[], nn.Module]
) -> Iterator[tuple[int, nn.Module]]:
    """Yield each candidate's place and one module that holds its merge until the next is asked for.

    Raises:
        RecipeError: no base where scales are searched.
        UserError: as `make_plan`, `merge_tensors` and `load_state`.
    """
    module, base = factory(), _base(recipe, tried)
    groups: dict[str, list[int]] = {}
    for place, candidate in enumerate(tried):
        key = json.dumps([candidate.method, dict(candidate.parameters)], sort_keys=True)
        groups.setdefault(key, []).append(place)
    for places in groups.values():
        first = tried[places[0]]
        whole = Candidate(first.method, first.parameters, None if first.scale is None else 1.0)
        tensors = dict(merge_tensors(make_plan(_with(recipe, whole, dtype="float32"))))
        for place in places:
            load_state(module, _scaled(base, tensors, tried[place].scale))
            yield place, module


def _with(recipe: Recipe, candidate: Candidate, *, dtype: str | None = None) -> Recipe:
    data = {**recipe.as_data(), "method": candidate.choice}
    return make_recipe(data if dtype is None else {**data, "dtype": dtype})


def _base(recipe: Recipe, tried: Sequence[Candidate]) -> Mapping[str, Tensor]:
    if all(candidate.scale is None for candidate in tried):
        return {}
    base = make_plan(recipe).base
    if base is None:
        raise RecipeError("Scales of a task vector are tuned, which needs a base; add --base PATH.")
    return {name: base[name].float() for name in base if base[name].is_floating_point()}


def _scaled(
    base: Mapping[str, Tensor], merged: Mapping[str, Tensor], scale: float | None
) -> Mapping[str, Tensor]:
    if scale is None or scale == 1.0:
        return merged
    return {
        name: torch.lerp(base[name], tensor, scale) if name in base else tensor
        for name, tensor in merged.items()
    }
