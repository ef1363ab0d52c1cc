"""What the commands do: parse what the flags name, call the library, print."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from rich.console import Console
from rich.table import Table

from mergewell.cli.given import chosen_recipe, read_data
from mergewell.cli.progress import steps
from mergewell.component import Fractions
from mergewell.device import make_device
from mergewell.errors import DataError, OutputError, RecipeError, did_you_mean
from mergewell.jobs import JobResult, parse_shard, run_shard
from mergewell.methods.base import METHODS
from mergewell.plan import make_plan
from mergewell.recipe import read_recipe, recipe_from_flags
from mergewell.run import run as run_plan
from mergewell.storage.manifest import Algorithm

ENGINES = ("threads", "ray")
ALGORITHMS: dict[str, Algorithm] = {"xxh3-128": "xxh3-128", "sha256": "sha256"}


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def _workers(workers: int | None) -> int:
    return workers if workers is not None else os.cpu_count() or 1


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


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
    resume: bool,
    workers: int | None,
    shard: str | None,
    engine: str,
    device: str,
    hash_kind: str,
    print_recipe: bool,
    as_json: bool,
) -> None:
    """Merge by a recipe file or by flags."""
    recipe = chosen_recipe(
        recipe_file, base=base, experts=experts, method=method, settings=settings, seed=seed,
        dtype=dtype,
    )  # fmt: skip
    if print_recipe:
        print(recipe.to_yaml(), end="")
        return
    if out is None:
        raise OutputError("No output folder is named; add --out DIR.")
    if engine not in ENGINES:
        raise RecipeError(f"--engine {engine}: {did_you_mean(engine, ENGINES)}")
    if hash_kind not in ALGORITHMS:
        raise RecipeError(f"--hash {hash_kind}: {did_you_mean(hash_kind, ALGORITHMS)}")
    if shard is not None and engine != "threads":
        raise RecipeError(f"--shard {shard} and --engine {engine} exclude each other; drop one.")
    where = make_device(device)
    if device != "cpu" and (shard is not None or engine != "threads"):
        raise RecipeError(
            f"--device {device} and {'--shard' if shard is not None else '--engine ray'} exclude "
            "each other; drop one."
        )
    job = parse_shard(shard) if shard is not None else None
    planned = make_plan(recipe)
    for warning in planned.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    written = 0
    with steps(in_bytes=True) as shown:

        def progress(count: int) -> None:
            nonlocal written
            written += count
            shown.update("merge", written, planned.write_bytes)

        algorithm = ALGORITHMS[hash_kind]
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
                device=where, on_progress=progress,
            )  # fmt: skip
    if as_json:
        _print_json(manifest.model_dump(mode="json"))
        return
    print(
        f"{out}: {manifest.tensors} tensors, {manifest.tensors_changed} changed, "
        f"{_bytes(planned.write_bytes)} in {manifest.seconds:.1f} s."
    )


def _print_job(result: JobResult, out: Path, *, as_json: bool) -> None:
    if as_json:
        _print_json({"version": 1, "written": result.written, "missing": result.missing})
        return
    left = (
        f"{len(result.missing)} are still missing, and whoever finishes last commits"
        if result.missing
        else "none is missing, and another job has committed or is about to"
    )
    print(f"{out}: {len(result.written)} files written by this job; {left}.")


def plan(recipe_file: Path, *, as_json: bool, workers: int | None) -> None:
    """Show a plan."""
    planned = make_plan(read_recipe(recipe_file))
    count = _workers(workers)
    if as_json:
        _print_json(planned.as_data(count))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "shape", "dtype", "method", "coefficients"):
        table.add_column(heading)
    for task in planned.tasks.values():
        table.add_row(
            task.name,
            "×".join(map(str, task.spec.shape)) or "scalar",
            str(task.spec.dtype).removeprefix("torch."),
            task.treatment,
            "" if task.copied_from is not None else " ".join(f"{c:g}" for c in task.coefficients),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(
        f"\n{len(planned.tasks)} tensors · reads {_bytes(planned.read_bytes)} in {planned.passes} "
        f"pass{'es' if planned.passes > 1 else ''} · writes {_bytes(planned.write_bytes)} · memory "
        f"up to {_bytes(planned.peak_bytes(count))} with {count} workers · about "
        f"{(planned.read_bytes + planned.write_bytes) / 1e9:.1f} s at 1 GB/s"
    )
    for warning in planned.warnings:
        print(f"warning: {warning}")


def check(
    base: str | None,
    experts: Sequence[str],
    *,
    data: str | None,
    calibration: Path | None,
    mode: str,
    samples: int,
    model_factory: str | None,
    method: str,
    settings: Sequence[str],
    deep: bool,
    json_file: str | None,
    html_file: Path | None,
) -> None:
    """Check experts against their base."""
    from mergewell import check as checking
    from mergewell.calibration.file import read_calibration

    recipe = recipe_from_flags(base=base, experts=experts, method=method, settings=settings)
    planned = make_plan(recipe)
    if calibration is not None and data is not None:
        raise DataError("--calibration and --data exclude each other; drop one.")
    used = None
    if data is not None:
        used = read_data(recipe, data, mode=mode, samples=samples, model_factory=model_factory)
    with steps() as shown:
        found = checking.check(
            planned,
            checking.short_names(expert.path for expert in recipe.experts),
            data=used,
            calibration=read_calibration(calibration) if calibration is not None else None,
            deep=deep,
            on_step=shown.update,
        )
    payload = found.model_dump(mode="json")
    if html_file is not None:
        from mergewell.report.page import write_check_page

        write_check_page(found, html_file)
    if json_file == "-":
        _print_json(payload)
        return
    if json_file is not None:
        Path(json_file).write_text(json.dumps(payload, allow_nan=False), encoding="utf-8")
    from mergewell.report.check_text import show_check

    show_check(found, Console())


def demo(out: Path | None, *, text: bool, as_json: bool) -> None:
    """Run the demo."""
    from mergewell.demo.run import run_demo

    folder = out if out is not None else Path("mergewell-demo-text" if text else "mergewell-demo")
    with steps() as shown:
        results = run_demo(folder, text=text, on_step=shown.update)
    if as_json:
        _print_json(results.model_dump(mode="json"))
        return
    from mergewell.demo.run import summary

    print(summary(results))
    print(f"\nThe report: {(folder / results.report).resolve()}")


def report(folder: Path, other: Path | None, *, out: Path | None) -> None:
    """Make a results folder's page again, or compare two merges or checks."""
    from mergewell.report.compare import compare
    from mergewell.report.page import write_page

    if other is None and out is not None:
        raise OutputError("--out is for a comparison; name a second folder or drop it.")
    print(
        write_page(folder) if other is None else compare(folder, other, out or Path("compare.html"))
    )


def verify(folder: Path, *, deep: bool, as_json: bool) -> None:
    """Verify a merged folder."""
    from mergewell.storage.manifest import read_manifest, verify_files
    from mergewell.verify import verify_deep

    problems = verify_deep(folder) if deep else verify_files(folder)
    count = len(read_manifest(folder).outputs)
    if as_json:
        _print_json({"version": 1, "folder": str(folder), "files": count, "problems": problems})
    if problems:
        found = "is damaged" if not deep else "does not hold what its manifest says"
        raise OutputError(f"{folder} {found}: {' '.join(problems)} Merge again from its recipe.")
    if not as_json:
        deeper = ", and so are its inputs; tensors made again are equal" if deep else ""
        print(f"{folder}: {count} files are as they were written{deeper}.")


def methods(name: str | None, *, as_json: bool) -> None:
    """List methods or show one."""
    names = METHODS.names() if name is None else (METHODS.get(name).component_name(),)
    if as_json:
        _print_json({"version": 1, "methods": [describe_method(each) for each in names]})
        return
    if name is None:
        for each in names:
            needs = METHODS.get(each).needs
            what = ["base"] * needs.base + ([f"{needs.experts} experts"] if needs.experts else [])
            note = f" (needs {', '.join(what)})" if what else ""
            print(f"{each:<18} {METHODS.get(each).summary()}{note}")
        return
    print(f"{name}\n")
    print(inspect.cleandoc(METHODS.get(name).__doc__ or ""))
    print("\nParameters (--set NAME=VALUE, or keys under `method:` in a recipe):")
    for parameter in describe_method(name)["parameters"]:
        print(f"  {parameter['name']} = {parameter['default']}    {parameter['type']}")
        print(f"      {' '.join(parameter['help'].split())}")


def describe_method(name: str) -> dict[str, Any]:
    """Return what is known of a method, as plain data."""
    cls = METHODS.get(name)
    return {
        "name": name,
        "summary": cls.summary(),
        "paper": cls.paper,
        "needs": {
            "base": cls.needs.base,
            "experts": cls.needs.experts,
            "granularity": cls.needs.granularity,
        },
        "parameters": [
            {
                "name": field,
                "type": _type_name(info.annotation),
                "default": info.default,
                "help": info.description,
            }
            for field, info in cls.model_fields.items()
        ],
    }


def _type_name(annotation: Any) -> str:
    """Return a parameter's type in words."""
    if annotation == Fractions:
        return "number in (0, 1], or one for each expert"
    parts = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Literal:
            return "one of " + ", ".join(map(str, parts))
        case origin if origin is Annotated:
            return _type_name(parts[0])
        case origin if origin is tuple:
            return f"list ({_type_name(parts[0])} for each expert)"
        case None:
            return "none" if annotation is type(None) else annotation.__name__
        case _:
            return " or ".join(map(_type_name, parts))
