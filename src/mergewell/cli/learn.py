"""The command `learn`: arguments, and what it does and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergewell.cli.explain import (
    Base,
    Experts,
    Factory,
    Json,
    Samples,
    needed_data,
    opened,
    print_json,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergewell.learners.base import Material
    from mergewell.models.loader import ModuleSource
    from mergewell.plan import Plan


def learn(
    name: Annotated[str, typer.Argument(help="A learner, such as greedy_soup.")],
    base: Base = None,
    expert: Experts = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Inputs, with `labels` for some learners; once, or once an expert, of its task.",
        ),
    ] = None,
    model_factory: Factory = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="A parameter of the learner.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What to choose by, in place of accuracy: pkg.module:function of a module, or "
            "lm-eval:TASK[@DIR].",
        ),
    ] = None,
    samples: Samples = 1024,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the recipe, as YAML.")
    ] = None,
    json: Json = False,
) -> None:
    """Learn a recipe from data; print it, or write it to a file."""
    import sys

    from mergewell.cli.progress import steps
    from mergewell.engines.base import one_thread_a_worker
    from mergewell.errors import OutputError
    from mergewell.flags import from_settings
    from mergewell.learners.base import LEARNERS, Material
    from mergewell.tune.metric import goal_of

    learner = from_settings(LEARNERS, name, set_ or [])
    planned, source = opened(base, expert or [], model_factory)
    if out is not None and out.exists():
        raise OutputError(f"{out} exists already and nothing is overwritten; choose another name.")
    material, used = Material(source.build), 0
    if data or metric is None:
        material, used = _material(planned, source, data or [], samples)
    if metric is not None:
        goal = goal_of(metric, planned, data=data or [], samples=samples)
        material = Material(source.build, goal, material.tasks)
    with steps() as shown, one_thread_a_worker():
        learned = learner.learn(planned.recipe, material, on_step=shown.update)
    text = learned.recipe.to_yaml()
    if out is not None:
        from mergewell.report.results import write_text

        write_text(out, text)
    if json:
        trials: list[dict[str, Any]] = [
            {
                "experts": [each.path for each in trial.recipe.experts],
                "score": trial.score,
                "kept": trial.kept,
            }
            for trial in learned.trials
        ]
        print_json(
            {
                "version": 1,
                "learner": name,
                "score": learned.score,
                "samples": used,
                "trials": trials,
                "recipe": learned.recipe.as_data(),
            }
        )
        return
    for note in learned.recipe.notes:
        print(note, file=sys.stderr)
    print(text if out is None else f"{out}: the recipe; merge it with `mergewell merge {out}`.")


def _material(
    planned: Plan, source: ModuleSource, paths: Sequence[str], samples: int
) -> tuple[Material, int]:
    """Return what a learner may use, and how many samples that is.

    Of several paths, one an expert, each holds inputs of that expert's task, and an equal part of
    the samples comes from each.

    Raises:
        DataError: the inputs cannot be read, or are neither one path nor one an expert.
    """
    from functools import partial

    from mergewell.descent.tasks import LearningTask
    from mergewell.errors import DataError
    from mergewell.labelled import accuracy, joined_labelled, load_labelled
    from mergewell.learners.base import Material

    count = len(planned.experts)
    if len(paths) not in (1, count):
        needed_data(paths[0] if paths else None)
        raise DataError(
            f"{len(paths)} paths of data are named for {count} experts; name one, or one for each "
            "expert, in their order."
        )
    if samples < 2 * len(paths):
        raise DataError(f"{samples} samples are too few for {count} experts; ask for more.")
    read = [
        load_labelled(
            path,
            model_folder=planned.reference.path,
            limit=len(range(number, samples, len(paths))),
        )
        for number, path in enumerate(paths)
    ]
    tasks = [
        LearningTask(number if len(paths) > 1 else None, each.batches, each.labels_by_batch)
        for number, each in enumerate(read)
    ]
    whole = joined_labelled(read)
    metric = None if whole.labels is None else partial(accuracy, data=whole)
    return Material(source.build, metric, tasks), whole.samples
