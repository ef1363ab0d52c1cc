"""What `calibrate` and `join` do: gather statistics on a few inputs, and put shards together."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergewell.calibration.collect import calibrate as gather
from mergewell.calibration.file import join_calibrations, write_calibration
from mergewell.calibration.forward import calibrate_forward
from mergewell.calibration.result import Calibration
from mergewell.cli.given import chosen_recipe, read_data
from mergewell.cli.progress import steps
from mergewell.errors import DataError, OutputError, RecipeError
from mergewell.jobs import parse_shard
from mergewell.plan import make_plan
from mergewell.recipe import MethodChoice


def calibrate(
    recipe_file: Path | None,
    out: Path | None,
    *,
    base: str | None,
    experts: Sequence[str],
    method: str | None,
    settings: Sequence[str],
    data: Sequence[str],
    samples: int,
    mode: str,
    model_factory: str | None,
    shard: str | None,
    gram: bool,
    fisher: str | None,
    as_json: bool,
) -> None:
    """Gather the statistics of a recipe's models on some data and write them to a file."""
    recipe = chosen_recipe(
        recipe_file, base=base, experts=experts, method=method, settings=settings
    )
    _require_new(out)
    if not data:
        raise DataError("No data are named; add --data PATH.")
    job = parse_shard(shard) if shard is not None else (0, 1)
    wanted = recipe.method.build()
    forward = "gram_forward" in wanted.needs.calibration and recipe.calibration is None
    if forward and (shard is not None or fisher is not None):
        raise RecipeError(
            f"{wanted.component_name()} is calibrated in one go, as all batches merge a layer "
            "together; leave out --shard and --fisher."
        )
    if forward:
        recipe = recipe.model_copy(update={"method": MethodChoice(name="average")})
    planned = make_plan(recipe)
    for warning in planned.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    used = read_data(
        recipe, data, folder=planned.reference.path, mode=mode, samples=samples,
        model_factory=model_factory, gram=gram, fisher=fisher,
    )  # fmt: skip
    with steps() as shown:
        if forward:
            found = calibrate_forward(planned, used, wanted, on_step=shown.update)
        else:
            found = gather(planned, used, shard=job, on_step=shown.update)
    _finish(out, found, as_json=as_json)


def join(files: Sequence[Path], out: Path | None, *, as_json: bool) -> None:
    """Join calibrations of shards of one data set."""
    _require_new(out)
    _finish(out, join_calibrations(files), as_json=as_json)


def _require_new(out: Path | None) -> None:
    """Refuse an output that cannot be, before the work begins."""
    if out is None:
        raise OutputError("No output file is named; add --out FILE.")
    if out.exists():
        raise OutputError(
            f"{out} exists already and nothing is overwritten; choose another name or remove it."
        )
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} is no folder; make it, or choose another for --out.")


def _finish(out: Path | None, found: Calibration, *, as_json: bool) -> None:
    assert out is not None
    write_calibration(out, found)
    head = found.head
    summary: dict[str, Any] = {
        "version": 1,
        "file": str(out),
        "data": head.data,
        "mode": head.mode,
        "samples": found.seen,
        "samples_in_all": head.samples,
        "batches": sorted(found.done),
        "batches_in_all": head.batches,
        "models": [{"name": m.name, "path": m.path, "digest": m.digest} for m in head.models],
        "layers": [unit.name for unit in head.units],
        "blocks": list(head.blocks),
        "uncovered": list(head.uncovered),
    }
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False))
        return
    left = head.batches - len(found.done)
    more = f"; {left} of {head.batches} batches are still to be run" if left else ""
    print(
        f"{out}: {found.seen} of {head.samples} samples, {len(head.units)} layers, "
        f"{len(head.blocks)} blocks, mode {head.mode}{more}."
    )
