"""Scores of test examples to the numbers of a row, with intervals over the examples."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from benchmark import Metric, Scores, shown

from mergewell.evaluate import estimate, resampled_means

Row = dict[str, Any]


def mean(scores: Scores) -> float:
    """Return the mean score, each task counting the same."""
    return float(np.mean([task.mean() for task in scores.values()]))


def judged(metric: Metric, scores: Scores, own: Scores, others: Mapping[str, Scores]) -> Row:
    """Return mean, tasks, worst task and the gain over each of `others`, as they are reported.

    The mean is over tasks (of perplexities the geometric one); the worst task is the one that
    keeps least of its own expert's result. `low` and `high` bound 95 % of 2000 resamples of the
    examples; for `over`, a pair, the same resamples serve both. Gains are in points, or, of
    perplexities, in per cent by which ours is lower.
    """
    tasks = {task: shown(metric, float(values.mean())) for task, values in scores.items()}
    kept = {task: retention(metric, tasks[task], shown(metric, own[task].mean())) for task in tasks}
    worst = min(kept, key=lambda task: kept[task])
    whole = mean(scores)
    found = estimate(whole, draws(scores))
    ends = sorted(shown(metric, end) for end in (found.low, found.high))
    return {
        "mean": shown(metric, whole), "low": ends[0], "high": ends[1], "tasks": tasks,
        "worst_task": worst, "worst": tasks[worst], "worst_kept": float(kept[worst]),
        "over": {name: gain(metric, scores, other) for name, other in others.items()},
    }  # fmt: skip


def retention(metric: Metric, value: float, own: float) -> float:
    """Return the share of the expert's result that is kept: 1 is all of it."""
    return value / own if metric == "accuracy" else own / value


def draws(scores: Scores) -> Any:
    """Return the mean over tasks in each resample, [R]."""
    parts = [
        resampled_means(row[None], seed=zlib.crc32(task.encode()))[:, 0]
        for task, row in scores.items()
    ]
    return np.mean(parts, axis=0)


def gain(metric: Metric, scores: Scores, other: Scores) -> list[float]:
    """Return how much better the scores are than others, with the ends of the interval."""
    differences = {task: scores[task] - other[task] for task in scores}
    found = estimate(mean(differences), draws(differences))

    def as_reported(value: float) -> float:
        return 100 * value if metric == "accuracy" else 100 * (1 - float(np.exp(-value)))

    return [as_reported(end) for end in (found.value, found.low, found.high)]
