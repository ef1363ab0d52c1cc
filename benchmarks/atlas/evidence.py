"""The atlas as arrays: a row an expert of a merge, its features, its retention.

Shapes: N rows, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from table import known

from mergewell.prediction.alone import ALONE
from mergewell.prediction.answers import UNLABELLED
from mergewell.prediction.forest import rows_of
from mergewell.prediction.lie import OF_EXPERTS, OF_MERGES
from mergewell.prediction.predictor import MEANS, with_means
from mergewell.prediction.resemblance import ALIKE

WEIGHTS = (*OF_EXPERTS, *OF_MERGES)
LABELLED = ("l_right", "l_loss", "l_retention", "l_loss_rise")
MEANT = tuple(f"mean_{name}" for name in MEANS)
INPUTS = (*UNLABELLED, *ALIKE, *ALONE, *MEANT)
FEATURES = {
    "weights": WEIGHTS,
    "unlabelled": (*WEIGHTS, *INPUTS),
    "labelled": (*WEIGHTS, *INPUTS, *LABELLED),
}
TOP = 1.5
"""Retention is cut here: an expert that is worse than the merge can be so by any factor."""


@dataclass(frozen=True)
class Evidence:
    """Rows of one or more families, merge after merge."""

    numbers: Sequence[dict[str, Any]]

    @classmethod
    def of(cls, families: Sequence[str]) -> Evidence:
        """Return what the tables of some families hold."""
        found: list[dict[str, Any]] = []
        for family in families:
            merges = {_key(row): row for row in known("merges", family)}
            pairs = {(row["base"], row["expert"]): row for row in known("alone", family)}
            for row in known("tasks", family):
                merge = merges[_key(row)]
                if row.get("u_cka_said") is None:
                    continue
                pair = pairs.get((row["base"], row["expert"]), {})
                found.append({**merge, **pair, **row, "of": (family, *_key(row)), "family": family})
        merged = groupby(found, key=lambda row: row["of"])
        return cls([row for _, rows in merged for row in with_means(list(rows))])

    def __len__(self) -> int:
        return len(self.numbers)

    def column(self, name: str) -> np.ndarray:
        """Return one column; a missing number is not a number."""
        return np.array([row.get(name, np.nan) for row in self.numbers], float)

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """Return features as rows, [N, F]."""
        return rows_of(names, self.numbers)

    @cached_property
    def retention(self) -> np.ndarray:
        """Merged over own accuracy, [N]."""
        own = np.maximum(self.column("own"), 1e-9)
        return np.clip(self.column("merged") / own, 0, TOP)

    @cached_property
    def merge(self) -> np.ndarray:
        """Which merge a row is of, [N]."""
        _, found = np.unique([repr(row["of"]) for row in self.numbers], return_inverse=True)
        return found

    @cached_property
    def set_(self) -> np.ndarray:
        """Which set of experts a row is of, [N]."""
        _, found = np.unique([repr(row["of"][:3]) for row in self.numbers], return_inverse=True)
        return found

    @cached_property
    def task(self) -> np.ndarray:
        """Which task a row is of, by family, [N]."""
        return np.array([f"{row['family']}/{row['task']}" for row in self.numbers])

    @cached_property
    def compatible(self) -> np.ndarray:
        """Whether nothing was done to a set to make it merge badly, [N]."""
        return np.array([not row.get("reason") for row in self.numbers])

    def holds(self, task: str) -> np.ndarray:
        """Return whether the merge of a row has a task at all, [N]."""
        inside = np.unique(self.merge[self.task == task])
        return np.isin(self.merge, inside)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Return the mean of each merge, in the order of `merges`."""
        return np.bincount(self.merge, values) / np.bincount(self.merge)

    def first(self, values: np.ndarray) -> np.ndarray:
        """Return what the first row of each merge has, in the order of `merges`."""
        _, places = np.unique(self.merge, return_index=True)
        return values[places]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("base", "set", "merge"))
