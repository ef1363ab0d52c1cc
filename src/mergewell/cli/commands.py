"""What the other commands do: parse what the flags name, call the library, print."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from rich.console import Console

from mergewell.cli.explain import print_json
from mergewell.cli.given import chosen_recipe, read_data
from mergewell.cli.progress import steps
from mergewell.component import Fractions
from mergewell.errors import DataError, OutputError
from mergewell.methods.base import METHODS
from mergewell.plan import make_plan

if TYPE_CHECKING:
    from mergewell.verify import Verified


def check(
    recipe_file: Path | None,
    *,
    base: str | None,
    experts: Sequence[str],
    data: Sequence[str],
    calibration: Path | None,
    mode: str,
    samples: int,
    model_factory: str | None,
    method: str | None,
    settings: Sequence[str],
    deep: bool,
    json_file: str | None,
    html_file: Path | None,
) -> None:
    """Check what a recipe, or flags, would merge."""
    from mergewell import check as checking
    from mergewell.calibration.file import read_calibration
    from mergewell.report.files import require_own_check, require_own_page, write_text

    if html_file is not None:  # before the work, not after it
        require_own_page(html_file)
    if json_file is not None and json_file != "-":
        require_own_check(Path(json_file))
    recipe = chosen_recipe(
        recipe_file, base=base, experts=experts, method=method, settings=settings
    )
    if calibration is not None and data:
        raise DataError("--calibration and --data exclude each other; drop one.")
    planned = make_plan(recipe)
    for warning in planned.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    used = None
    if data:
        used = read_data(
            recipe, data, folder=planned.reference.path, mode=mode, samples=samples,
            model_factory=model_factory,
        )  # fmt: skip
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
        print_json(payload)
        return
    if json_file is not None:
        write_text(Path(json_file), json.dumps(payload, allow_nan=False))
    from mergewell.report.check_text import show_check

    show_check(found, Console())


def demo(out: Path | None, *, text: bool, as_json: bool) -> None:
    """Run the demo."""
    from mergewell.demo.run import run_demo

    folder = out if out is not None else Path("mergewell-demo-text" if text else "mergewell-demo")
    with steps() as shown:
        results = run_demo(folder, text=text, on_step=shown.update)
    if as_json:
        print_json(results.model_dump(mode="json"))
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
    from mergewell.pipeline import is_pipeline
    from mergewell.storage.manifest import read_manifest

    if is_pipeline(folder):
        from mergewell.cli.pipeline import verify_components

        verify_components(folder, partial(_verified, deep=deep), as_json=as_json)
        return
    outputs = read_manifest(folder).outputs
    found = _verified(folder, deep=deep)
    if as_json:
        print_json(
            {
                "version": 1,
                "folder": str(folder),
                "files": len(outputs),
                "problems": found.problems,
                "notes": found.notes,
            }
        )
    if found.problems:
        what = "is damaged" if not deep else "does not hold what its manifest says"
        told = " ".join((*found.problems, *found.notes))
        raise OutputError(f"{folder} {what}: {told} Merge again from its recipe.")
    if not as_json:
        deeper = ", and so are its inputs; tensors made again are equal" if deep else ""
        print(f"{folder}: {len(outputs)} files are as they were written{deeper}.")
        for note in found.notes:
            print(f"  {note}")


def _verified(folder: Path, *, deep: bool) -> Verified:
    """Return what is wrong with a folder that has a manifest."""
    from mergewell.storage.manifest import read_manifest, verify_files
    from mergewell.verify import Verified, verify_deep

    with steps(in_bytes=True, patient=True) as shown:
        if deep:
            return verify_deep(folder, on_step=shown.update)
        total, done = sum(output.bytes for output in read_manifest(folder).outputs), 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            shown.update("files", done, total)

        return Verified(tuple(verify_files(folder, on_bytes=progress)))


def methods(name: str | None, *, as_json: bool) -> None:
    """List methods or show one."""
    names = METHODS.names() if name is None else (METHODS.get(name).component_name(),)
    if as_json:
        print_json({"version": 1, "methods": [describe_method(each) for each in names]})
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
    defaults = cls.model_construct().parameters()
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
                "default": defaults.get(field),
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
