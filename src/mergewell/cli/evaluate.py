"""The command `evaluate`: arguments, and what it does and prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergewell.cli.explain import Base, Experts, Factory, Json, print_json

if TYPE_CHECKING:
    from mergewell.evaluate import Estimate
    from mergewell.evaluation.compared import Comparison
    from mergewell.recipe import Recipe


def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(help="Models to judge, such as merged folders.")
    ] = None,
    base: Base = None,
    expert: Experts = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="A task's inputs with `labels`, or texts; repeat: in the order of the experts.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="pkg.module:function of a module, or lm-eval:TASK[@DIR]; repeat."
        ),
    ] = None,
    model_factory: Factory = None,
    samples: Annotated[int, typer.Option(min=1, help="At most this many inputs a task.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the intervals.")] = 0,
    json: Json = False,
) -> None:
    """Judge models on labelled data, texts or any metric; compare with the experts."""
    from mergewell.check import short_names
    from mergewell.cli.progress import steps
    from mergewell.engines.base import one_thread_a_worker
    from mergewell.evaluation.compared import compare
    from mergewell.evaluation.given import given_measures
    from mergewell.evaluation.models import Models
    from mergewell.storage.hub import local_path

    paths, under, experts = _named(models or [], base, expert or [])
    home = str(local_path(under)) if under is not None else None
    opened = Models(paths, base=home, model_factory=model_factory)
    tasks = dict(zip(short_names(data or []), data or [], strict=True))
    measures = given_measures(
        tasks, metric or [], experts=len(experts), folder=opened.folder, samples=samples
    )
    with steps(patient=True) as shown, one_thread_a_worker():
        found = compare(opened, measures, experts=experts, seed=seed, on_progress=shown.update)
    if json:
        print_json(found.as_data())
    else:
        _print(found)


def _named(
    given: Sequence[str], base: str | None, experts: Sequence[str]
) -> tuple[dict[str, str], str | None, list[str]]:
    """Return all models' paths by short name, the base's path, and the experts' names.

    Raises:
        ModelError: no model is named.
    """
    from mergewell.check import short_names
    from mergewell.errors import ModelError
    from mergewell.flags import recipe_from_flags

    recipe = _recipe_behind(given) if not experts and base is None else None
    if experts:
        recipe = recipe_from_flags(base=base, experts=experts, method="average", settings=[])
    own = [each.path for each in recipe.experts] if recipe is not None else []
    under = recipe.base if recipe is not None else base
    all_paths: list[str] = [*([under] if under is not None else []), *own, *given]
    paths = list(dict.fromkeys(all_paths))
    if not paths:
        raise ModelError("No model is named; name a merged folder, or --expert PATH.")
    names = dict(zip(paths, short_names(paths), strict=True))
    return {name: path for path, name in names.items()}, under, [names[path] for path in own]


def _recipe_behind(given: Sequence[str]) -> Recipe | None:
    """Return the recipe of the first merged folder here whose inputs are still there."""
    from mergewell.recipe import recipe_of_manifest
    from mergewell.storage.folder import is_there, parts_of
    from mergewell.storage.manifest import MANIFEST, read_manifest

    for path in map(Path, given):
        if not (path / MANIFEST).is_file():
            continue
        manifest = read_manifest(path)
        recipe = recipe_of_manifest(manifest, where=str(path)) if manifest.recipe else None
        if recipe is None or recipe.stages:
            continue
        if all(is_there(Path(part)) for model in recipe.models for part in parts_of(model)):
            return recipe
    return None


def _print(found: Comparison) -> None:
    width = max(map(len, found.models))
    for task, metric in found.metrics.items():
        examples = found.examples[task]
        how = f"{examples} examples" if examples > 1 else "one number"
        expert = f", retention against {found.experts[task]}" if task in found.experts else ""
        print(f"{task}: {metric} ({how}{expert})")
        for name, standing in found.models.items():
            kept = standing.retention.get(task)
            told = f"  {kept.value:.3f} retained" if kept is not None else ""
            print(f"  {name:<{width}}  {_number(standing.values[task])}{told}")
    if len(found.metrics) < 2 or not found.experts:
        return
    print("retention over all tasks")
    for name, standing in found.models.items():
        if standing.mean_retention is not None:
            print(
                f"  {name:<{width}}  {_number(standing.mean_retention)}  worst "
                f"{standing.worst_task}"
            )


def _number(one: Estimate) -> str:
    if one.low != one.low:
        return f"{one.value:.4g}"
    return f"{one.value:.4g} ({one.low:.4g} to {one.high:.4g})"
