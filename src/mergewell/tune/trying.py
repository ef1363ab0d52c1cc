"""Trying: candidates are merged, put into a module and judged, one after the other.

Candidates that differ in `scale` alone share one merge: along it the task vector is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mergewell.errors import RecipeError
from mergewell.models.loader import load_state
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors
from mergewell.tune.objective import Losses, Objective
from mergewell.tune.space import Candidate


class Trying:
    """One module that takes the merge of one candidate after another."""

    def __init__(self, recipe: Recipe, factory: Callable[[], nn.Module]) -> None:
        """Remember the recipe; nothing is merged yet."""
        self._recipe, self._module = recipe, factory()
        self._base: Mapping[str, Tensor] = {}
        self._key: str | None = None
        self._merged: Mapping[str, Tensor] = {}
        self.merges = 0
        """Merges that were made."""

    def put(self, candidate: Candidate) -> nn.Module:
        """Return the module with the merge of a candidate, until the next is put.

        Raises:
            RecipeError: no base where a scale is searched.
            UserError: as `make_plan`, `merge_tensors` and `load_state`.
        """
        if candidate.scale is not None and not self._base:
            self._base = _base(self._recipe)
        if candidate.shared != self._key:
            self._merged = {}  # the one before is let go of first
            scale = None if candidate.scale is None else 1.0
            whole = Candidate(candidate.method, candidate.parameters, scale)
            plan = make_plan(chosen(self._recipe, whole, dtype="float32"))
            self._merged, self._key = dict(merge_tensors(plan)), candidate.shared
            self.merges += 1
        load_state(self._module, _scaled(self._base, self._merged, candidate.scale))
        return self._module


Judge = Callable[[Sequence[Candidate]], Iterator[tuple[Candidate, Losses]]]
"""Yields candidates as they are done, and what each costs."""


@contextmanager
def judge_here(
    recipe: Recipe, objective: Objective, factory: Callable[[], nn.Module]
) -> Generator[Judge]:
    """Yield what judges candidates in this process; a merge serves until another is needed.

    Raises:
        UserError: as `Trying.put` and `Objective.losses`.
    """
    trying = Trying(recipe, factory)

    def judge(tried: Sequence[Candidate]) -> Iterator[tuple[Candidate, Losses]]:
        for candidate in tried:
            yield candidate, objective.losses(trying.put(candidate))

    yield judge


def merged(
    recipe: Recipe, tried: Sequence[Candidate], factory: Callable[[], nn.Module]
) -> Iterator[tuple[int, nn.Module]]:
    """Yield each candidate's place and one module that holds its merge until the next is asked for.

    Raises:
        UserError: as `Trying.put`.
    """
    trying = Trying(recipe, factory)
    for candidate in by_merge(tried):
        yield tried.index(candidate), trying.put(candidate)


def by_merge(tried: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates, those that share a merge one after the other."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in tried:
        groups.setdefault(candidate.shared, []).append(candidate)
    return [candidate for group in groups.values() for candidate in group]


def chosen(recipe: Recipe, candidate: Candidate, *, dtype: str | None = None) -> Recipe:
    """Return the recipe with a candidate as its method."""
    data = {**recipe.as_data(), "method": candidate.choice}
    return make_recipe(data if dtype is None else {**data, "dtype": dtype})


def _base(recipe: Recipe) -> Mapping[str, Tensor]:
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
