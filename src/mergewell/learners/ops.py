"""What learners share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Judge = Callable[[tuple[int, ...]], float]
"""A number for a selection of experts by their places; higher is better."""


def best_first(scores: Sequence[float]) -> tuple[int, ...]:
    """Return the places of the scores from the highest down; equal ones in their order."""
    return tuple(sorted(range(len(scores)), key=lambda place: -scores[place]))


def greedy_selection(
    order: Sequence[int], judge: Judge, *, first: float
) -> tuple[tuple[int, ...], float]:
    """Return the experts that are kept, and the judgement of them together.

    Starts from the first in `order`, whose own score is `first`; each other is added if the
    judgement of the selection with it does not fall, and is never compared with itself.

    Source: Wortsman et al. 2022, arXiv:2203.05482, recipe 1 (greedy soup).
    """
    kept, best = (order[0],), first
    for candidate in order[1:]:
        score = judge((*kept, candidate))
        if score >= best:
            kept, best = (*kept, candidate), score
    return kept, best
