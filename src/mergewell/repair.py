"""Repair: a merged folder with mended activation statistics, written as a new folder.

Only what the repair changes is new: running statistics (kind `batch_norm`), or also weights and
biases of layers without BatchNorm (kind `repair`, which needs the folder's recipe for its experts).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

import mergewell
from mergewell.errors import ModelError, PlanError, RecipeError, UserError, did_you_mean
from mergewell.models.batch_norm import reestimate
from mergewell.models.dataflow import Batch
from mergewell.models.loader import load_state
from mergewell.models.repair import repair
from mergewell.plan import Plan, make_plan
from mergewell.recipe import recipe_of_manifest
from mergewell.storage.checkpoint import Checkpoint, open_checkpoint
from mergewell.storage.manifest import MANIFEST, InputFile, Manifest, hash_file, read_manifest
from mergewell.storage.writer import CheckpointWriter, ShardLayout

RepairKind = Literal["batch_norm", "repair"]
"""Re-estimated BatchNorm statistics, or REPAIR."""


def checked_kind(kind: str) -> RepairKind:
    """Return a kind of repair as it is.

    Raises:
        RecipeError: there is no such kind.
    """
    for known in get_args(RepairKind):
        if kind == known:
            return known
    raise RecipeError(f"There is no repair {kind!r}: {did_you_mean(kind, get_args(RepairKind))}")


def repair_folder(
    folder: str | Path,
    factory: Callable[[], nn.Module],
    batches: Sequence[Batch],
    out: str | Path,
    kind: RepairKind = "batch_norm",
) -> Manifest:
    """Write `out`: the model in `folder` with its activation statistics mended on the batches.

    All tensors and side files are copied but those that changed. The manifest's `repair` says what
    was done, on how many samples, what was left alone, and keeps the recipe of the merge. Experts
    that were trained with frozen statistics are made worse by new ones: where the folder's recipe
    shows such experts, `repair` has a warning.

    Raises:
        ModelError: there is nothing to repair, or the module does not take these weights.
        DataError: batches that cannot be used.
        CheckpointError: a folder that cannot be read, or without manifest for kind `repair`.
        PlanError: the repair changes nothing.
        OutputError: `out` exists or cannot be written.
    """
    began, folder = time.perf_counter(), Path(folder)
    checkpoint = open_checkpoint(folder)
    module = factory()
    load_state(module, checkpoint)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if kind == "batch_norm":
        done = reestimate(module, batches)
    else:
        experts, coefficients = _endpoints(folder, _plan_of(folder))
        endpoints = [_built(factory, expert) for expert in experts]
        done = repair(module, endpoints, coefficients, batches)
    changed = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    if not changed:
        raise PlanError(
            f"Repairing {folder} changes no tensor: its statistics are those of the data already."
        )
    new = {_stored_name(name, checkpoint): tensor for name, tensor in changed.items()}
    inputs = [
        InputFile(path=str(file.resolve()), hash=hash_file(file), bytes=file.stat().st_size)
        for file in checkpoint.files
    ]
    layouts = [
        ShardLayout(shard.file, tuple(checkpoint.spec(name) for name in shard.names))
        for shard in checkpoint.shards
    ]
    key = f"repair-{kind}-{'-'.join(file.hash for file in inputs)}"
    metadata = {"format": "pt", "mergewell.repair": kind}
    with CheckpointWriter(Path(out), layouts, metadata=metadata, key=key) as writer:
        for name in checkpoint:
            writer.write(name, 0, _flat(name, new, checkpoint))
        for file in checkpoint.side_files:
            writer.add_file(file.name, checkpoint.side_file(file))
        return writer.commit(
            {
                "recipe": {},
                "repair": {
                    "kind": kind,
                    "of": str(folder.resolve()),
                    "recipe": _recipe_of(folder),
                    "samples": sum(_samples(batch) for batch in batches),
                    "layers": list(done.layers),
                    "untouched": dict(done.untouched),
                    "tensors": sorted(new),
                    "warnings": _warnings(folder, new),
                },
                "inputs": inputs,
                "tensors": len(checkpoint),
                "tensors_changed": len(new),
                "seed": 0,
                "versions": {
                    "mergewell": mergewell.__version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "directory": str(Path.cwd()),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )


def _plan_of(folder: Path) -> Plan:
    """Return the plan that a folder was merged by."""
    manifest = read_manifest(folder)
    return make_plan(recipe_of_manifest(manifest, where=str(folder / MANIFEST)))


def _endpoints(folder: Path, plan: Plan) -> tuple[tuple[Checkpoint, ...], list[float]]:
    """Return the experts that a folder was merged from, and their shares."""
    coefficients = [expert.coefficient for expert in plan.recipe.experts]
    if min(coefficients) < 0 or sum(coefficients) <= 0:
        raise RecipeError(
            f"{folder} was merged with the coefficients {coefficients}, between which nothing can "
            "be interpolated; re-estimate its BatchNorms (--kind batch_norm) instead."
        )
    return plan.experts, [coefficient / sum(coefficients) for coefficient in coefficients]


def _warnings(folder: Path, changed: Iterable[str]) -> list[str]:
    """Return what speaks against the repair, as far as the folder's inputs can be looked at."""
    names = [name for name in changed if name.endswith("running_mean")]
    try:
        models = _plan_of(folder).inputs
    except UserError:
        return []  # no manifest, or inputs that are gone: nothing to compare
    if len(models) < 2 or not names:
        return []
    first, *others = models
    if all(torch.equal(first[name], other[name]) for name in names for other in others):
        return [
            "The merged models share one set of BatchNorm statistics, so they were trained with "
            "these frozen; new ones usually make such models worse: compare before use."
        ]
    return []


def _recipe_of(folder: Path) -> Mapping[str, object] | None:
    return dict(read_manifest(folder).recipe) if (folder / MANIFEST).is_file() else None


def _built(factory: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> nn.Module:
    module = factory()
    load_state(module, tensors)
    return module


def _stored_name(name: str, checkpoint: Checkpoint) -> str:
    """Return a tensor's name in the checkpoint, which may carry or lack a prefix."""
    if name in checkpoint.specs:
        return name
    found = [
        stored
        for stored in checkpoint.specs
        if stored.endswith(f".{name}") or name.endswith(f".{stored}")
    ]
    if len(found) != 1:
        raise ModelError(
            f"{checkpoint.path} has {len(found) or 'no'} tensors that could be {name!r}, which the "
            "repair changed; give a module whose names are the checkpoint's."
        )
    return found[0]


def _flat(name: str, new: Mapping[str, Tensor], checkpoint: Checkpoint) -> Tensor:
    if name not in new:
        return checkpoint.read(name)
    return new[name].detach().to(checkpoint.spec(name).dtype).reshape(-1)


def _samples(batch: Batch) -> int:
    return len(batch) if isinstance(batch, Tensor) else len(next(iter(batch.values())))
