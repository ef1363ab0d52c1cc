"""Models compared on measures: numbers with intervals, retention, the worst task.

Shapes: N examples, r rows of scores, R resamples.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from mergewell.errors import DataError
from mergewell.evaluate import Estimate, estimate, resampled_means
from mergewell.evaluation.base import Measure, Rows

OnProgress = Callable[[str, int, int], None]
"""Called as (model, measures done, measures in all)."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How one model does."""

    values: Mapping[str, Estimate]
    """The measures' numbers, by task."""

    retention: Mapping[str, Estimate]
    """Number over that of the task's expert (of perplexity the inverse), by task."""

    mean_retention: Estimate | None
    """Mean over the tasks; None where no expert is known."""

    worst_task: str
    """The task of the lowest retention; empty where no expert is known."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the models do, by name."""

    models: Mapping[str, Standing]
    metrics: Mapping[str, str]
    """The metric of each task."""

    experts: Mapping[str, str]
    """What each task's retention is held against: its expert, or the best of the experts."""

    examples: Mapping[str, int]
    """N of each task; 1 where a metric gives one number and no interval."""

    seed: int

    def as_data(self) -> dict[str, Any]:
        """Return plain data: the contract of `mergewell evaluate --json`; undefined is null."""

        def plain(one: Estimate | None) -> dict[str, float | None] | None:
            if one is None:
                return None
            return {k: v if np.isfinite(v) else None for k, v in asdict(one).items()}

        return {
            "version": 1,
            "tasks": {
                task: {
                    "metric": self.metrics[task],
                    "examples": self.examples[task],
                    "expert": self.experts.get(task),
                }
                for task in self.metrics
            },
            "models": {
                name: {
                    "values": {task: plain(one) for task, one in each.values.items()},
                    "retention": {task: plain(one) for task, one in each.retention.items()},
                    "mean_retention": plain(each.mean_retention),
                    "worst_task": each.worst_task or None,
                }
                for name, each in self.models.items()
            },
            "seed": self.seed,
        }


def compare(
    models: Mapping[str, nn.Module],
    measures: Sequence[Measure],
    *,
    experts: Sequence[str] = (),
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Return how models do at some tasks; all share the bootstrap's resamples of the examples.

    `experts` are the experts' names among the models, in the order that measures count them in. A
    task whose expert is not said is held against the best of them. Models are looked up one after
    the other and once, so a mapping that loads them when asked keeps one in memory.

    Raises:
        DataError: no measure, two for one task, or models that give different numbers of scores.
        UserError: as the measures.
    """
    tasks = [each.task for each in measures]
    if not measures or len(set(tasks)) < len(tasks):
        raise DataError(
            f"Each task needs a name of its own, and there is {', '.join(tasks) or 'no task'}; "
            "name data or a --metric for each."
        )
    rows: dict[str, list[Rows]] = {}
    for name in models:
        module, rows[name] = models[name], []
        for each in measures:
            rows[name].append(each.scores(module))
            if on_progress is not None:
                on_progress(name, len(rows[name]), len(measures))
    values: dict[str, dict[str, tuple[float, Rows]]] = {name: {} for name in models}
    for place, each in enumerate(measures):
        shapes = {own[place].shape for own in rows.values()}
        if len(shapes) > 1:
            raise DataError(
                f"{each.metric} on {each.task} gives the models different numbers of scores; "
                "judge all on the same examples."
            )
        held = np.stack([own[place] for own in rows.values()])
        draws = resampled_means(held, seed=seed + zlib.crc32(each.task.encode()))
        if held.shape[-1] == 1:
            draws = np.full_like(draws, np.nan)  # one number says nothing of its spread
        for index, name in enumerate(models):
            value = float(each.value(held[index].mean(-1)))
            values[name][each.task] = value, each.value(draws[:, index])
    against = {
        each.task: _expert(each, experts, values) for each in measures if _known(each, experts)
    }
    return Comparison(
        {name: _standing(values[name], measures, values, against) for name in models},
        {each.task: each.metric for each in measures},
        against,
        {each.task: rows[next(iter(models))][i].shape[-1] for i, each in enumerate(measures)},
        seed,
    )


def _known(measure: Measure, experts: Sequence[str]) -> bool:
    return bool(experts) and (measure.expert is None or measure.expert < len(experts))


def _expert(
    measure: Measure,
    experts: Sequence[str],
    values: Mapping[str, Mapping[str, tuple[float, Rows]]],
) -> str:
    """Return what a task's retention is held against."""
    if measure.expert is not None:
        return experts[measure.expert]
    best = max if measure.higher else min
    return best(experts, key=lambda name: values[name][measure.task][0])


def _standing(
    own: Mapping[str, tuple[float, Rows]],
    measures: Sequence[Measure],
    values: Mapping[str, Mapping[str, tuple[float, Rows]]],
    against: Mapping[str, str],
) -> Standing:
    retention: dict[str, tuple[float, Rows]] = {}
    for each in measures:
        if each.task not in against:
            continue
        mine, theirs = own[each.task], values[against[each.task]][each.task]
        parts = (mine, theirs) if each.higher else (theirs, mine)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.divide(parts[0][0], parts[1][0])
            retention[each.task] = float(value), np.divide(parts[0][1], parts[1][1])
    mean = None
    if retention:
        draws = np.mean([draw for _, draw in retention.values()], axis=0)
        mean = estimate(float(np.mean([value for value, _ in retention.values()])), draws)
    return Standing(
        {task: estimate(*found) for task, found in own.items()},
        {task: estimate(*found) for task, found in retention.items()},
        mean,
        min(retention, key=lambda task: retention[task][0], default=""),
    )
