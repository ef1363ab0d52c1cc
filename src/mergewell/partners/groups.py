"""Which experts go together: the quality of a group, foretold from its pairs.

Shapes: K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mergewell.errors import DataError

EVERY = 12
"""Experts up to which every group is looked at; beyond, groups grow by the best partner."""

Pairs = NDArray[np.float64]
"""Quality of the merge of two experts, [K, K], symmetric; the diagonal is not looked at."""


@dataclass(frozen=True, slots=True)
class Group:
    """Some experts, by their places, and the quality that their pairs foretell."""

    members: tuple[int, ...]
    quality: float


def foretold(pairs: Pairs, members: Sequence[int]) -> float:
    """Return the mean quality of the pairs of a group.

    Source: mean pairwise quality foretold that of three and four CLIP experts at r 0.79 to 0.99
    (a student replication of Mergeability-Bench, `Tinarabbanii/mergeability`).
    """
    return float(np.mean([pairs[i, j] for i, j in combinations(members, 2)]))


def best_groups(pairs: Pairs) -> list[Group]:
    """Return the best group of each size from 2 to K; ties go to the first experts.

    Every group is looked at for at most 12 experts; beyond, the best pair is grown by the partner
    that keeps the mean highest.

    Raises:
        DataError: fewer than two experts, or pairs that are not symmetric numbers.
    """
    count = len(pairs)
    off = ~np.eye(count, dtype=bool)
    if count < 2 or pairs.shape != (count, count):
        raise DataError("Partners are chosen among at least two experts; name more.")
    if not np.isfinite(pairs[off]).all() or not np.allclose(pairs[off], pairs.T[off]):
        raise DataError("The quality of pairs must be numbers, the same for (i, j) and (j, i).")
    found: list[Group] = []
    for size in range(2, count + 1):
        if count <= EVERY or size == 2:
            tried = combinations(range(count), size)
        else:
            last = found[-1].members
            tried = (tuple(sorted((*last, k))) for k in range(count) if k not in last)
        groups = [Group(members, foretold(pairs, members)) for members in tried]
        found.append(max(groups, key=lambda group: group.quality))
    return found
