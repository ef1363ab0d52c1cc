"""A fitted sum of regression trees, as numbers: evaluated here, fitted by `make atlas-fit`.

Shapes: N rows, F features, T trees, V nodes of all trees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees whose leaves are added up; a missing feature goes the way that its node says."""

    start: Numbers
    """What is added to the trees, [1]."""

    roots: NDArray[np.int32]
    """Where each tree begins, [T]."""

    feature: NDArray[np.int32]
    """Which feature a node asks for, [V]; -1 at a leaf."""

    threshold: Numbers
    """At most this goes left, [V]."""

    missing_left: NDArray[np.bool_]
    """Where a missing feature goes, [V]."""

    left: NDArray[np.int32]
    right: NDArray[np.int32]
    value: Numbers
    """What a leaf adds, [V]."""

    def __call__(self, rows: Numbers) -> Numbers:
        """Return the sum for each row [N, F], [N]."""
        places = np.broadcast_to(self.roots, (len(rows), len(self.roots))).copy()
        lines = np.arange(len(rows))[:, None]
        while True:
            asked = self.feature[places]
            inside = asked >= 0
            if not inside.any():
                return self.start[0] + self.value[places].sum(1)
            seen = rows[lines, np.maximum(asked, 0)]
            goes_left = np.where(
                np.isnan(seen), self.missing_left[places], seen <= self.threshold[places]
            )
            below = np.where(goes_left, self.left[places], self.right[places])
            places = np.where(inside, below, places)

    def as_arrays(self) -> Mapping[str, NDArray[np.generic]]:
        """Return the parts by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Forest:
        """Return the forest of `as_arrays`."""
        return cls(**{each.name: arrays[each.name] for each in fields(cls)})  # pyright: ignore


def rows_of(features: Sequence[str], numbers: Sequence[Mapping[str, float]]) -> Numbers:
    """Return features by name as rows [N, F]; what is not there is missing."""
    return np.array([[one.get(name, np.nan) for name in features] for one in numbers], float)
