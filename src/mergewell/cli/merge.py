"""What `merge` and `plan` do and print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mergewell.cli.amounts import byte_count
from mergewell.cli.explain import print_json
from mergewell.cli.given import chosen_recipe
from mergewell.cli.progress import steps
from mergewell.device import make_device
from mergewell.errors import OutputError, RecipeError, did_you_mean
from mergewell.flags import from_settings
from mergewell.jobs import JobResult, parse_shard, run_shard
from mergewell.mixture.choice import read_mixture
from mergewell.pipeline import is_of_pipelines
from mergewell.plan import Plan, make_plan
from mergewell.recipe import read_recipe
from mergewell.report.numbers import counted
from mergewell.run import run as run_plan
from mergewell.storage.manifest import Algorithm, Manifest, changed_inputs, manifest_at, repair_of
from mergewell.storage.staging import Staging

ENGINES = ("threads", "ray")
ALGORITHMS: dict[str, Algorithm] = {"xxh3-128": "xxh3-128", "sha256": "sha256"}


def _workers(workers: int | None) -> int:
    return workers if workers is not None else os.cpu_count() or 1


def merge(
    recipe_file: Path | None,
    out: Path | None,
    *,
    base: str | None,
    experts: Sequence[str],
    method: str | None,
    settings: Sequence[str],
    seed: int | None,
    dtype: str | None,
    calibration: str | None,
    resume: bool,
    workers: int | None,
    shard: str | None,
    engine: str,
    device: str,
    hash_kind: str,
    companion: str | None,
    card: bool,
    print_recipe: bool,
    as_json: bool,
) -> None:
    """Merge by a recipe file or by flags; assemble the mixture that a file describes."""
    of_one_model: dict[str, object] = {
        "--resume": resume, "--shard": shard, "--device": None if device == "cpu" else device,
        "--engine": None if engine == "threads" else engine, "--companion": companion,
        "--card": card,
    }  # fmt: skip
    mixture = read_mixture(recipe_file) if recipe_file is not None else None
    if mixture is not None and print_recipe:
        print(mixture.to_yaml(), end="")
        return
    if mixture is not None:
        from mergewell.cli.mixture import merge_mixture

        recipes: dict[str, object] = {
            "--base": base, "--expert": experts or None, "--method": method, "--seed": seed,
            "--set": settings or None, "--dtype": dtype, "--calibration": calibration,
        }  # fmt: skip
        merge_mixture(
            mixture, _named(out), flags=recipes | of_one_model, algorithm=_algorithm(hash_kind),
            as_json=as_json,
        )  # fmt: skip
        return
    recipe = chosen_recipe(
        recipe_file, base=base, experts=experts, method=method, settings=settings, seed=seed,
        dtype=dtype, calibration=calibration,
    )  # fmt: skip
    if print_recipe:
        print(recipe.to_yaml(), end="")
        return
    out, algorithm = _named(out), _algorithm(hash_kind)
    if engine not in ENGINES:
        raise RecipeError(f"--engine {engine}: {did_you_mean(engine, ENGINES)}")
    if is_of_pipelines(recipe):
        from mergewell.cli.pipeline import merge_components

        merge_components(
            recipe, out, flags=of_one_model, workers=_workers(workers), algorithm=algorithm,
            as_json=as_json,
        )  # fmt: skip
        return
    if shard is not None and engine != "threads":
        raise RecipeError(f"--shard {shard} and --engine {engine} exclude each other; drop one.")
    where = make_device(device)
    if device != "cpu" and (shard is not None or engine != "threads"):
        raise RecipeError(
            f"--device {device} and {'--shard' if shard is not None else '--engine ray'} exclude "
            "each other; drop one."
        )
    job = parse_shard(shard) if shard is not None else None
    before = manifest_at(recipe_file) if recipe_file is not None else None
    planned = make_plan(recipe)
    if companion is not None and (job is not None or engine != "threads"):
        raise RecipeError(
            f"--companion {companion} and {'--shard' if job is not None else '--engine ray'} "
            "exclude each other; drop one."
        )
    beside = _companions(companion, planned) if companion is not None else {}
    for warning in planned.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    lost = 0 if resume or job is not None else Staging(out.resolve()).finished_tensors()
    if lost:
        print(
            f"warning: {out}: discarding {counted(lost, 'tensor')} that an unfinished run has "
            "finished; to keep such work, go on with --resume.",
            file=sys.stderr,
        )
    written = 0
    with steps(in_bytes=True) as shown:

        def progress(count: int) -> None:
            nonlocal written
            written += count
            shown.update("merge", written, planned.write_bytes)

        if job is not None:
            result = run_shard(
                planned, out, *job, workers=_workers(workers), algorithm=algorithm,
                on_progress=progress,
            )  # fmt: skip
            manifest = result.manifest
            if manifest is None:
                _print_job(result, out, as_json=as_json)
                return
        elif engine == "ray":
            from mergewell.engines.ray import run_on_ray

            manifest = run_on_ray(
                planned, out, workers=workers, resume=resume, algorithm=algorithm,
                on_progress=progress,
            )  # fmt: skip
        else:
            manifest = run_plan(
                planned, out, workers=_workers(workers), resume=resume, algorithm=algorithm,
                device=where, beside=beside, on_progress=progress,
            )  # fmt: skip
    if card:
        from mergewell.card import write_card

        write_card(out)
    for warning in _not_the_same(before, manifest) if before is not None else ():
        print(f"warning: {warning}", file=sys.stderr)
    repaired = repair_of(manifest)
    for warning in repaired.get("warnings", ()):
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
        return
    mended = (
        f"; {counted(len(repaired['layers']), 'layer')} repaired on {repaired['samples']} samples"
        if repaired
        else ""
    )
    print(
        f"{out}: {manifest.tensors} tensors, {manifest.tensors_changed} changed, "
        f"{byte_count(planned.write_bytes)} in {manifest.seconds:.1f} s{mended}."
    )


def _named(out: Path | None) -> Path:
    if out is None:
        raise OutputError("No output folder is named; add --out DIR.")
    return out


def _algorithm(kind: str) -> Algorithm:
    if kind not in ALGORITHMS:
        raise RecipeError(f"--hash {kind}: {did_you_mean(kind, ALGORITHMS)}")
    return ALGORITHMS[kind]


def _companions(text: str, planned: Plan) -> dict[str, Callable[[Path], object]]:
    """Return what writes the companion of `NAME` or `NAME:KEY=VALUE`, by its file's name.

    Raises:
        RecipeError: there is no such companion, or it does not go with the merge.
    """
    from mergewell.check import short_names
    from mergewell.companions.base import COMPANIONS, SUFFIX, require_fit, write_companion
    from mergewell.repair import mended

    name, *settings = text.split(":")
    companion = from_settings(
        COMPANIONS, name, settings, named_by="--companion", set_by=f"--companion {name}:"
    )
    tasks = short_names(expert.path for expert in planned.recipe.experts)
    require_fit(companion, planned, tasks)
    return {
        f"{name}{SUFFIX}": lambda path: write_companion(companion, mended(planned), tasks, path)
    }


def _not_the_same(before: Manifest, after: Manifest) -> list[str]:
    """Return why a merge that was made again from its manifest may not be the same."""
    found = [
        f"{path} is not what was merged then: no input has its hash."
        for path in changed_inputs(before, after)
    ]
    if before.device != after.device:
        found.append(f"It was merged on {before.device} then, whose last bits can differ.")
    return found


def _print_job(result: JobResult, out: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"version": 1, "written": result.written, "missing": result.missing})
        return
    left = (
        f"{len(result.missing)} are still missing, and whoever finishes last commits"
        if result.missing
        else "none is missing, and another job has committed or is about to"
    )
    print(f"{out}: {len(result.written)} files written by this job; {left}.")


def plan(recipe_file: Path, *, as_json: bool, workers: int | None) -> None:
    """Show a plan: of a merge, of each component of a pipeline, or of a mixture."""
    count = _workers(workers)
    mixture = read_mixture(recipe_file)
    if mixture is not None:
        from mergewell.cli.mixture import show_mixture

        show_mixture(mixture, as_json=as_json)
        return
    recipe = read_recipe(recipe_file)
    if is_of_pipelines(recipe):
        from mergewell.cli.pipeline import show_components

        show_components(recipe, partial(_show, count=count), as_json=as_json, workers=count)
        return
    planned = make_plan(recipe)
    if as_json:
        print_json(planned.as_data(count))
        return
    _show(planned, count)


def _show(planned: Plan, count: int) -> None:
    """Print a plan for so many workers."""
    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "shape", "dtype", "method", "coefficients"):
        table.add_column(heading)
    for task in planned.tasks.values():
        table.add_row(
            escape(task.name),
            "×".join(map(str, task.spec.shape)) or "scalar",
            str(task.spec.dtype).removeprefix("torch."),
            task.treatment,
            "" if task.copied_from is not None else " ".join(f"{c:g}" for c in task.coefficients),
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print()
    console.print(_groups(planned))
    read, written, peak = map(
        byte_count, (planned.read_bytes, planned.write_bytes, planned.peak_bytes(count))
    )
    print(
        f"\n{len(planned.tasks)} tensors · reads {read} in {planned.passes} "
        f"pass{'es' if planned.passes > 1 else ''} · writes {written} · memory up to {peak} with "
        f"{count} workers · about "
        f"{(planned.read_bytes + planned.write_bytes) / 1e9:.1f} s at 1 GB/s"
    )
    step = planned.recipe.repair
    if step is not None:
        what = "BatchNorms are re-estimated" if step.kind == "batch_norm" else "REPAIR is run"
        print(f"then {what} on at most {step.samples} inputs of {step.data}")
    for warning in planned.warnings:
        print(f"warning: {warning}")


def _groups(planned: Plan) -> Table:
    """Return the methods with their parameters, and how many tensors each set of them merges."""
    counts: dict[tuple[str, str, str], int] = {}
    for task in planned.tasks.values():
        known = {} if task.copied_from is not None else task.method.parameters()
        shown = ", ".join(f"{name} = {_value(value)}" for name, value in known.items())
        key = (task.treatment, shown, ", ".join(task.calibration))
        counts[key] = counts.get(key, 0) + 1
    table = Table(box=None, pad_edge=False)
    for heading in ("tensors", "method", "parameters", "guided by"):
        table.add_column(heading, overflow="fold")
    for (name, parameters, guide), count in counts.items():
        table.add_row(str(count), name, escape(parameters), guide)
    return table


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
