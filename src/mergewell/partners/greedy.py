"""Top-k greedy merging, with a look at model kinship.

Every model of the search is a mean of experts, known by its coefficients alone; kinship of any two
then follows from the products of the experts' task vectors, and no weight is read for it.
Shapes: K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mergewell.errors import DataError

SATURATED = 0.9
"""Kinship of the best models beyond which merging them changes next to nothing."""

Coefficients = tuple[float, ...]
"""Of the experts, [K], summing to 1."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A model of the search: the coefficients of its experts, and its score, higher is better."""

    coefficients: Coefficients
    score: float
    generation: int


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found."""

    tried: tuple[Tried, ...]
    """All models, the experts first, in the order of trial."""

    stopped: str
    """Why no further generation was begun: "no better", "saturated" or "generations"."""

    @property
    def best(self) -> Tried:
        """The model with the highest score, the first of equals."""
        return max(self.tried, key=lambda one: one.score)


def kinship(covariance: NDArray[np.float64], one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of two mixtures of task vectors with this covariance [K, K]."""
    a, b = np.asarray(one), np.asarray(other)
    size = float(a @ covariance @ a) * float(b @ covariance @ b)
    return float(a @ covariance @ b) / size**0.5 if size > 0 else float("nan")


def greedy(
    covariance: NDArray[np.float64],
    score: Callable[[Coefficients], float],
    *,
    top: int = 3,
    explore: bool = True,
    saturated: float = SATURATED,
    generations: int = 10,
) -> Search:
    """Return the search that merges the `top` models pair by pair, generation by generation.

    `covariance` is that of the experts' task vectors. With `explore` a generation also merges the
    best model with the one least kin to it. It ends when the best score is no higher than before,
    or when the mean kinship among the top models is above `saturated`.

    Paper: Hu et al. 2024, "Exploring Model Kinship for Merging LLMs", arXiv:2410.12613.
    Departures: merges are means and not SLERP, so that kinship follows from the experts'. Partners
    for exploration have the lowest kinship, as in the text and the data, not the pseudocode.

    Raises:
        DataError: fewer than two experts or top models, or no generation.
    """
    count = len(covariance)
    if count < 2 or top < 2 or generations < 1:
        raise DataError(
            "A greedy search needs two experts, two top models and one generation at least; it was "
            f"given {count}, {top} and {generations}."
        )
    unit = np.eye(count)
    tried = [Tried(key, score(key), 0) for key in (tuple(map(float, row)) for row in unit)]
    for generation in range(1, generations + 1):
        ranked = sorted(tried, key=lambda one: -one.score)
        leaders = ranked[:top]
        near = [
            kinship(covariance, a.coefficients, b.coefficients) for a, b in combinations(leaders, 2)
        ]
        if np.mean(near) > saturated:
            return Search(tuple(tried), "saturated")
        wanted = [*combinations(leaders, 2)]
        if explore:
            first = ranked[0]
            far = min(
                ranked[1:],
                key=lambda one: kinship(covariance, first.coefficients, one.coefficients),
            )
            wanted.append((first, far))
        known = {one.coefficients for one in tried}
        for a, b in wanted:
            mixed = tuple((x + y) / 2 for x, y in zip(a.coefficients, b.coefficients, strict=True))
            if mixed not in known:
                known.add(mixed)
                tried.append(Tried(mixed, score(mixed), generation))
        if max(one.score for one in tried) <= ranked[0].score:
            return Search(tuple(tried), "no better")
    return Search(tuple(tried), "generations")
