"""The command `learn`: arguments, and what it does and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergewell.cli.explain import (
    Base,
    Experts,
    Factory,
    Json,
    Samples,
    opened,
    print_json,
)


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

    from mergewell.cli.given import material_of
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
        material, used = material_of(planned, source, data or [], samples)
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
