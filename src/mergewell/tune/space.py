"""Candidates: settings of methods, as many of each, spread as a Latin hypercube.

What is searched for a method is its own `search`, values worth trying by parameter.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergewell.errors import RecipeError
from mergewell.methods.base import METHODS


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting of one method."""

    method: str
    parameters: Mapping[str, Any]
    """Without `scale` where that is searched."""

    scale: float | None = None
    """The parameter `scale`, in which the merged task vector is linear; None: not searched."""

    @property
    def choice(self) -> dict[str, Any]:
        """The method as a recipe names it."""
        scale = {} if self.scale is None else {"scale": self.scale}
        return {"name": self.method, **self.parameters, **scale}

    @property
    def shared(self) -> str:
        """What candidates that share a merge have in common: all but the scale's value."""
        named = [self.method, dict(self.parameters), self.scale is None]
        return json.dumps(named, sort_keys=True)


def candidates(methods: Sequence[str], *, budget: int = 10, seed: int = 0) -> list[Candidate]:
    """Return at most `budget` candidates of each method, in turns of the methods.

    Each value of a parameter is taken as often as any other, in a random order that depends on the
    seed and the method's name. No candidate comes twice.

    Raises:
        RecipeError: an unknown method, one that needs a calibration, none, or no budget.
    """
    if not methods:
        raise RecipeError("No method is named to tune; name at least one with --method.")
    if budget < 1:
        raise RecipeError(f"A budget of {budget} leaves nothing to try; give at least 1.")
    columns = [_of(method, budget, seed) for method in dict.fromkeys(methods)]
    return [column[place] for place in range(budget) for column in columns if place < len(column)]


def axes(method: str) -> Mapping[str, tuple[Any, ...]]:
    """Return the values that are worth trying, by parameter.

    Raises:
        RecipeError: an unknown method, or one that needs a calibration.
    """
    cls = METHODS.get(method)
    if METHODS.build(method, {n: values[0] for n, values in cls.search.items()}).needs.calibration:
        raise RecipeError(
            f"tune: {method} is guided by a calibration, which tune does not make; name "
            "methods of weights alone."
        )
    return cls.search


def _of(method: str, budget: int, seed: int) -> list[Candidate]:
    search = axes(method)
    generator = np.random.default_rng([seed, zlib.crc32(method.encode())])
    drawn: dict[str, list[Any]] = {}
    for name, values in search.items():
        spread = [values[place * len(values) // budget] for place in range(budget)]
        if budget > len(values):
            spread = [values[place % len(values)] for place in range(budget)]
        drawn[name] = [spread[place] for place in generator.permutation(budget)]
    found: list[Candidate] = []
    for place in range(budget):
        picked = {name: column[place] for name, column in drawn.items()}
        scale = picked.pop("scale", None)
        candidate = Candidate(method, picked, scale)
        if candidate not in found:
            found.append(candidate)
    return found
