"""What commands do with pipelines: folders of several models, as diffusers saves them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from mergewell.cli.amounts import byte_count
from mergewell.cli.explain import print_json
from mergewell.cli.given import refuse_flags
from mergewell.cli.progress import steps
from mergewell.errors import OutputError
from mergewell.pipeline import components_of, merge_pipeline, merged_components, plan_pipeline
from mergewell.plan import Plan
from mergewell.recipe import Recipe
from mergewell.storage.manifest import Algorithm
from mergewell.verify import Verified

Verify = Callable[[Path], Verified]


def merge_components(
    recipe: Recipe,
    out: Path,
    *,
    flags: Mapping[str, object],
    workers: int | None,
    algorithm: Algorithm,
    as_json: bool,
) -> None:
    """Merge pipelines; `flags` are those that are of one model.

    Raises:
        RecipeError: such a flag is set.
        UserError: as `merge_pipeline`.
    """
    refuse_flags(flags, "a pipeline is merged component by component")
    plans = plan_pipeline(recipe)
    _warn(plans)
    total, written = sum(plan.write_bytes for plan in plans.values()), 0
    with steps(in_bytes=True) as shown:

        def progress(count: int) -> None:
            nonlocal written
            written += count
            shown.update("merge", written, total)

        manifests = merge_pipeline(
            recipe, out, plans=plans, workers=workers, algorithm=algorithm, on_progress=progress
        )
    copied = _copied(recipe, manifests)
    if as_json:
        components = {name: each.model_dump(mode="json") for name, each in manifests.items()}
        print_json({"version": 1, "components": components, "copied": copied})
        return
    for name, manifest in manifests.items():
        print(f"{name}: {manifest.tensors} tensors, {manifest.tensors_changed} changed.")
    print(f"{out}: {byte_count(total)} merged; copied as they are: {', '.join(copied) or 'none'}.")


def show_components(
    recipe: Recipe, show: Callable[[Plan], None], *, as_json: bool, workers: int
) -> None:
    """Show the plan of each component.

    Raises:
        UserError: as `plan_pipeline`.
    """
    plans = plan_pipeline(recipe)
    copied = _copied(recipe, plans)
    if as_json:
        components = {name: plan.as_data(workers) for name, plan in plans.items()}
        print_json({"version": 1, "components": components, "copied": copied})
        return
    for name, planned in plans.items():
        print(f"# {name}\n")
        show(planned)
        print()
    print(f"copied as they are: {', '.join(copied) or 'none'}")


def verify_components(folder: Path, verify: Verify, *, as_json: bool) -> None:
    """Verify each component that was merged.

    Raises:
        CheckpointError: no component was merged.
        OutputError: a component is damaged.
    """
    names = merged_components(folder)
    found = {name: verify(folder / name) for name in names}
    unseen = [name for name in components_of(folder) if name not in found]
    problems = {name: [*each.problems] for name, each in found.items() if each.problems}
    if as_json:
        components = {n: {"problems": f.problems, "notes": f.notes} for n, f in found.items()}
        print_json(
            {"version": 1, "folder": str(folder), "components": components, "copied": unseen}
        )
    if problems:
        told = " ".join(f"{name}: {' '.join(each)}" for name, each in problems.items())
        raise OutputError(
            f"{folder} does not hold what its components' manifests say: {told} Merge again from "
            "its recipe."
        )
    if as_json:
        return
    for name, each in found.items():
        print(f"{folder / name}: as it was written.")
        for note in each.notes:
            print(f"  {note}")
    print(
        f"not looked at, as they were copied and have no manifest: {', '.join(unseen) or 'none'}."
    )


def _copied(recipe: Recipe, merged: Mapping[str, object]) -> list[str]:
    return [name for name in components_of(recipe.models[0]) if name not in merged]


def _warn(plans: Mapping[str, Plan]) -> None:
    for name, plan in plans.items():
        for warning in plan.warnings:
            print(f"warning: {name}: {warning}", file=sys.stderr)
