"""What the command and the library share: a search from what users give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from mergewell.descent.tasks import LearningTask
from mergewell.errors import RecipeError, did_you_mean
from mergewell.evaluation.given import Metric
from mergewell.plan import Plan
from mergewell.tune.journal import Journal
from mergewell.tune.metric import LABELS, goal_of
from mergewell.tune.objective import Objective, Outputs, Reference, make_objective
from mergewell.tune.on_ray import judge_on_ray
from mergewell.tune.search import OnStep, Tuned, tune
from mergewell.tune.space import candidates
from mergewell.tune.strategy import Grid, Lines, Strategy
from mergewell.tune.trying import judge_here

METHODS = ("task_arithmetic", "ties", "tsv", "iso_c")
"""Methods that are tried unless some are named."""

Search = Literal["grid", "line", "optuna"]
"""Candidates known from the start; golden section, coordinate by coordinate; all at once."""

_REFERENCES: tuple[Reference, ...] = ("anchored", "expert", "ensemble", "mix", "answers")

_AT_ONCE = 8
"""Candidates that Optuna proposes at a time where a cluster judges them."""


def default_reference(plan: Plan, outputs: Outputs) -> Reference:
    """Return the reference unless one is named: what came out best where it is possible."""
    if outputs == "features":
        return "mix"
    return "answers" if plan.base is None else "anchored"


def tune_given(
    plan: Plan,
    factory: Callable[[], nn.Module],
    tasks: Sequence[LearningTask],
    *,
    methods: Sequence[str] = METHODS,
    budget: int = 10,
    search: str = "grid",
    journal: str | Path | None = None,
    engine: str = "here",
    reference: str | None = None,
    outputs: str = "logits",
    metric: Metric | None = None,
    data: Sequence[str] = (),
    samples: int = 16,
    patience: int | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Tuned:
    """Return what a search finds without labels, or by a metric; see `search.tune`.

    `tasks` are the unlabelled inputs, `data` the paths whose labels the metric `labels` judges by.

    Raises:
        RecipeError: a word that is none of those known, or options that exclude each other.
        UserError: as `search.tune`, `make_objective`, `goal_of` and the strategies.
    """
    for flag, word, known in (
        ("reference", reference, _REFERENCES), ("outputs", outputs, get_args(Outputs)),
        ("search", search, get_args(Search)), ("engine", engine, ("here", "ray")),
    ):  # fmt: skip
        if word is not None and word not in known:
            raise RecipeError(f"--{flag} {word}: {did_you_mean(word, known)}")
    if (journal is not None) != (search == "optuna"):
        raise RecipeError(
            "--search optuna keeps what it tried in a file; add --journal FILE."
            if journal is None
            else f"--journal {journal} is of --search optuna alone; name both or neither."
        )
    if engine == "ray" and search == "line":
        raise RecipeError(
            "--search line tries one candidate at a time, so --engine ray has nothing to share "
            "out; take --search grid or optuna."
        )
    if metric is not None and reference is not None:
        raise RecipeError(
            f"--reference {reference} and --metric {_name(metric)} exclude each other; drop one."
        )
    if metric is not None and metric != LABELS and data:
        raise RecipeError(
            f"--metric {_name(metric)} does not look at --data; drop --data, or judge by "
            f"--metric {LABELS}."
        )
    shaped: Outputs = "features" if outputs == "features" else "logits"
    named: dict[str | None, Reference] = {word: word for word in _REFERENCES}
    aim = named.get(reference) or default_reference(plan, shaped)
    named_by = None if metric is None else _name(metric)
    strategy = _strategy(
        search, methods, budget, seed, journal, 1 if engine == "here" else _AT_ONCE,
        [plan.recipe.as_data(), named_by, aim, shaped, samples, list(data)],
    )  # fmt: skip
    objective: Objective
    if metric is not None:
        objective = goal_of(metric, plan, data=data, samples=samples)
    else:
        objective = make_objective(aim, shaped, tasks, plan, factory)
    found = tune(
        plan.recipe, strategy, objective, factory, seed=seed, patience=patience,
        metric=named_by,
        judging=judge_here if engine == "here" else judge_on_ray, on_step=on_step,
    )  # fmt: skip
    return found if metric is not None else replace(found, reference=aim)


def _strategy(
    search: str,
    methods: Sequence[str],
    budget: int,
    seed: int,
    journal: str | Path | None,
    at_once: int,
    key: object,
) -> Strategy:
    if search == "line":
        return Lines(methods, budget=budget)
    if search == "optuna" and journal is not None:
        return Journal(methods, journal, key, budget=budget, at_once=at_once, seed=seed)
    return Grid(candidates(methods, budget=budget, seed=seed))


def _name(metric: Metric) -> str:
    if isinstance(metric, str):
        return metric
    named = getattr(metric, "__name__", None) or getattr(metric, "metric", None)
    return str(named or type(metric).__name__)
