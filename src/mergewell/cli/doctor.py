"""The command `doctor`: arguments, and what it does and prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergewell.cli.explain import Base, Experts, Factory, Json, print_json

if TYPE_CHECKING:
    from mergewell.doctor.visit import Visit
    from mergewell.recipe import Recipe

WHOLE = ""
"""The name of a model that is no component of a pipeline."""

HEADINGS = {
    "garbage": "Makes the merge garbage",
    "damage": "Does damage",
    "doubt": "Deserves a second look",
}
"""What stands above the findings of each severity."""


def doctor(
    target: Annotated[
        Path | None, typer.Argument(help="A recipe, before; a merged folder, after; or flags.")
    ] = None,
    base: Base = None,
    expert: Experts = None,
    method: Annotated[
        str | None, typer.Option(help="A name from `mergewell methods`; average if absent.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Inputs to try the result on; or random.")
    ] = None,
    model_factory: Factory = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 2 if anything is found.")
    ] = False,
    json: Json = False,
) -> None:
    """Name what makes merges garbage, before a merge and after it."""
    from mergewell.cli.progress import steps
    from mergewell.doctor.visit import doctor as visit

    merged, recipe = _named(target, base, expert or [], method)
    found: dict[str, Visit] = {}
    with steps(patient=True) as shown:
        for name, folder, of_it in _models(merged, recipe):
            found[name] = visit(
                of_it, merged=folder, data=data, model_factory=model_factory, on_step=shown.update
            )
    if json and list(found) == [WHOLE]:
        print_json(found[WHOLE].as_data())
    elif json:
        components = {name: each.as_data() for name, each in found.items()}
        print_json({"version": 1, "components": components})
    for name, each in found.items() if not json else ():
        if name != WHOLE:
            print(f"# {name}\n")
        _print(each)
    if strict and any(each.troubles for each in found.values()):
        raise typer.Exit(2)


def _models(
    merged: Path | None, recipe: Recipe | None
) -> Iterator[tuple[str, Path | None, Recipe | None]]:
    """Yield what is looked at, by name: one model, or each merged component of a pipeline."""
    from mergewell.pipeline import (
        component_recipe,
        is_of_pipelines,
        is_pipeline,
        merged_components,
        plan_pipeline,
    )

    if recipe is not None and is_of_pipelines(recipe):
        names = plan_pipeline(recipe) if merged is None else merged_components(merged)
        for name in names:
            yield name, None if merged is None else merged / name, component_recipe(recipe, name)
    elif merged is not None and is_pipeline(merged):
        for name in merged_components(merged):
            yield name, merged / name, recipe
    else:
        yield WHOLE, merged, recipe


def _named(
    target: Path | None, base: str | None, experts: list[str], method: str | None
) -> tuple[Path | None, Recipe | None]:
    """Return the result that is named, if one is, and the recipe of it or of a merge to come."""
    from mergewell.cli.given import chosen_recipe

    result = target is not None and (target.is_dir() or target.suffix == ".safetensors")
    if result and not experts and base is None:
        return target, None
    recipe = chosen_recipe(
        None if result else target, base=base, experts=experts, method=method, settings=[]
    )
    return target if result else None, recipe


def _print(found: Visit) -> None:
    from mergewell.report.numbers import counted

    looked = ", ".join(name.replace("_", " ") for name in found.looked_at)
    what = f"{counted(len(found.models), 'model')}, {counted(found.tensors, 'tensor')}"
    if not found.troubles:
        print(f"nothing found; looked at {what}: {looked}.")
    for severity, heading in HEADINGS.items():
        sentences = [each.sentence for each in found.troubles if each.severity == severity]
        if sentences:
            print(f"{heading}:")
            print("\n".join(f"- {sentence}" for sentence in sentences))
    if found.troubles:
        print(f"Looked at {what}: {looked}.")
    for name, why in found.left_out.items():
        print(f"Not looked at: {name.replace('_', ' ')}, as {why}.")
    for note in found.notes:
        print(f"Note: {note}")
