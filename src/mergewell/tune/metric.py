"""Any metric as what candidates are judged by: labels, texts, a function, an lm-eval task."""

from __future__ import annotations

from collections.abc import Sequence

from mergewell.evaluation.base import Goal
from mergewell.evaluation.given import Metric, given_measures, measure_of
from mergewell.plan import Plan

LABELS = "labels"
"""The metric of the data themselves: accuracy on their labels, perplexity of texts."""


def goal_of(metric: Metric, plan: Plan, *, data: Sequence[str] = (), samples: int = 1024) -> Goal:
    """Return a metric as a goal, an `Objective` that gives each example's cost.

    `labels` is accuracy on the data's labels, or perplexity of texts; each path is a task, of
    `samples` examples. Any other metric does not look at the data.

    Raises:
        RecipeError: a metric that cannot be found.
        DataError: labels of no data, or data that cannot be read.
    """
    folder = plan.reference.path if plan.reference.path.is_dir() else None
    if metric == LABELS:
        tasks = {str(path): str(path) for path in data}
        return Goal(
            given_measures(tasks, experts=len(plan.experts), folder=folder, samples=samples)
        )
    return Goal([measure_of(metric, folder=folder, samples=samples)])
