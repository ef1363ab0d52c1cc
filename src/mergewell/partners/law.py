"""The scaling law of merging: what one expert more is worth, fitted from three points.

Source: "Model Merging Scaling Laws" (arXiv:2509.24244), L(k) = floor + A / (k + b) for models of
one size. Departures: any quality that approaches its limit so, rising or falling; and an interval,
without which three points fit three numbers and seem exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergewell.errors import DataError

POINTS, DRAWS, LEVEL = 3, 2000, 0.95
MOST = 1000
"""Experts beyond which is not asked."""

IDENTIFIED = 0.95
"""Share of draws that must follow a law for anything to be said of more experts."""


@dataclass(frozen=True, slots=True)
class Law:
    """Quality of a merge of k experts: limit + pull / (k + offset)."""

    limit: float
    pull: float
    offset: float

    def __call__(self, experts: float) -> float:
        """Return the quality of a merge of so many experts."""
        return self.limit + self.pull / (experts + self.offset)

    def enough(self, tolerance: float) -> int:
        """Return the least number of experts, of which one more changes at most `tolerance`."""
        # |pull| / ((k + b)(k + 1 + b)) = tolerance is quadratic in k + b
        size = abs(self.pull)
        root = (-1 + math.sqrt(1 + 4 * size / tolerance)) / 2
        return min(MOST, max(1, math.ceil(root - self.offset - 1e-9)))


@dataclass(frozen=True, slots=True)
class Scaling:
    """A law, and how far its three points can be trusted."""

    law: Law | None
    """None: the points bend the wrong way, or not at all."""

    followed: float
    """Share of draws of the points, within their errors, through which a law goes."""

    tolerance: float
    enough: int | None
    """Experts beyond which one more changes at most `tolerance`; None without a law."""

    low: int | None
    high: int | None
    """95 % interval of `enough`; None where less than 95 % of the draws follow a law."""


def fit_law(points: Sequence[tuple[int, float]]) -> Law | None:
    """Return the law through three points (experts, quality), or None where there is none.

    With r = (y1 - y2)(k3 - k2) / ((y2 - y3)(k2 - k1)): offset = (k3 - r k1) / (r - 1), which needs
    changes of one sign that shrink (r > 1).

    Raises:
        DataError: not three points, or numbers of experts that do not differ.
    """
    given = sorted(points)
    if len({k for k, _ in given}) != POINTS or len(given) != POINTS:
        raise DataError(
            f"A scaling law is fitted to the quality of {POINTS} different numbers of experts, not "
            f"of {[k for k, _ in given]}; measure others."
        )
    (k1, y1), (k2, y2), (k3, y3) = given
    if y1 == y2 == y3:
        return Law(y1, 0.0, 0.0)
    if (y1 - y2) * (y2 - y3) <= 0:
        return None
    ratio = (y1 - y2) * (k3 - k2) / ((y2 - y3) * (k2 - k1))
    if ratio <= 1:
        return None
    offset = (k3 - ratio * k1) / (ratio - 1)
    pull = (y1 - y2) * (k1 + offset) * (k2 + offset) / (k2 - k1)
    return Law(y1 - pull / (k1 + offset), pull, offset)


def scaling(
    points: Sequence[tuple[int, float, float]], *, tolerance: float, seed: int = 0
) -> Scaling:
    """Return the law through (experts, quality, its standard error), and what may be concluded.

    Raises:
        DataError: as `fit_law`, or a tolerance or an error that is not above, or at least, 0.
    """
    if tolerance <= 0 or any(error < 0 for _, _, error in points):
        raise DataError("The tolerance of a scaling law must be above 0, and no error below 0.")
    law = fit_law([(k, y) for k, y, _ in points])
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((DRAWS, len(points)))
    found: list[int] = []
    for row in noise:
        drawn = fit_law([(k, y + e * z) for (k, y, e), z in zip(points, row, strict=True)])
        if drawn is not None:
            found.append(drawn.enough(tolerance))
    followed = len(found) / DRAWS
    low = high = None
    if followed >= IDENTIFIED and law is not None:
        edges = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        low, high = math.floor(edges[0]), math.ceil(edges[1])
    return Scaling(
        law, followed, tolerance, None if law is None else law.enough(tolerance), low, high
    )
