"""Repair: a merged folder with mended activation statistics, written as a new folder.

Only what the repair changes is new: running statistics (kind `batch_norm`), or also weights and
biases of layers without BatchNorm (kind `repair`, which needs the folder's recipe for its experts).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mergewell.engines.base import one_thread_a_worker
from mergewell.errors import ModelError, PlanError, RecipeError, UserError, did_you_mean
from mergewell.inputs import input_files
from mergewell.models.batch_norm import Repaired, reestimate
from mergewell.models.dataflow import Batch
from mergewell.models.loader import load_state
from mergewell.models.repair import repair
from mergewell.plan import Mended, Plan, make_plan
from mergewell.recipe import recipe_of_manifest
from mergewell.repair_step import RepairKind, RepairStep, step_parts
from mergewell.run import merge_tensors
from mergewell.storage.checkpoint import Checkpoint, open_checkpoint
from mergewell.storage.manifest import (
    MANIFEST,
    InputFile,
    Manifest,
    hash_file,
    read_manifest,
    repair_of,
    versions,
)
from mergewell.storage.writer import CheckpointWriter, ShardLayout


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
    *,
    step: RepairStep | None = None,
) -> Manifest:
    """Write `out`: the model in `folder` with its activation statistics mended on the batches.

    All tensors and side files are copied but those that changed. The manifest's `repair` says what
    was done, on how many samples, what was left alone, and keeps the recipe of the merge. Experts
    that were trained with frozen statistics are made worse by new ones: where the folder's recipe
    shows such experts, `repair` has a warning. With `step`, which names what `factory` and
    `batches` were made from, the manifest tells how to do the same again.

    Raises:
        ModelError: there is nothing to repair, or the module does not take these weights.
        DataError: batches that cannot be used.
        CheckpointError: a folder that cannot be read, or without manifest for kind `repair`.
        PlanError: the repair changes nothing.
        OutputError: `out` exists or cannot be written.
    """
    began, folder = time.perf_counter(), Path(folder)
    checkpoint = open_checkpoint(folder)
    new, done = _of_folder(folder, checkpoint, factory, batches, kind)
    data = () if step is None else input_files(step.data)
    inputs = [
        InputFile(path=str(file.resolve()), hash=hash_file(file), bytes=file.stat().st_size)
        for file in (*checkpoint.files, *data)
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
                    **_told(kind, done, batches, new, _models_of(folder)),
                    "of": str(folder.resolve()),
                    "recipe": _recipe_of(folder),
                    "step": None if step is None else _seen_from_anywhere(step),
                },
                "inputs": inputs,
                "tensors": len(checkpoint),
                "tensors_changed": len(new),
                "seed": 0,
                "versions": versions(),
                "directory": str(Path.cwd()),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )


def mended(plan: Plan) -> Plan:
    """Return a plan with the tensors that its recipe's repair makes anew; others as they are.

    The merge is made in memory, before the repair, and run on the inputs with one thread.

    Raises:
        UserError: as `repair_folder`.
    """
    step = plan.recipe.repair
    if step is None or plan.mended is not None:
        return plan
    factory, batches = step_parts(step, str(plan.reference.path))
    with one_thread_a_worker():
        new, done = repaired_tensors(
            dict(merge_tensors(plan)), factory, batches, step.kind,
            endpoints=lambda: (plan.experts, _shares("The recipe", plan)),
        )  # fmt: skip
    about = _told(step.kind, done, batches, new, plan.inputs)
    return replace(plan, mended=Mended(new, about))


def repaired_tensors(
    tensors: Mapping[str, Tensor],
    factory: Callable[[], nn.Module],
    batches: Sequence[Batch],
    kind: RepairKind,
    *,
    endpoints: Callable[[], tuple[Sequence[Checkpoint], Sequence[float]]],
) -> tuple[dict[str, Tensor], Repaired]:
    """Return the tensors that a repair makes anew, by their names in `tensors`, and what was done.

    They are in the dtype of the tensors. `endpoints` returns the experts and their shares, and is
    asked for REPAIR alone.

    Raises:
        ModelError, DataError, PlanError: as `repair_folder`.
    """
    module = _built(factory, tensors)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if kind == "batch_norm":
        done = reestimate(module, batches)
    else:
        experts, shares = endpoints()
        done = repair(module, [_built(factory, expert) for expert in experts], shares, batches)
    changed = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    if not changed:
        raise PlanError(
            "The repair changes no tensor: the model's statistics are those of the data already."
        )
    new = {_stored_name(name, tensors): tensor.detach() for name, tensor in changed.items()}
    return {name: tensor.to(tensors[name].dtype) for name, tensor in new.items()}, done


def repair_again(manifest: Manifest) -> dict[str, Tensor] | None:
    """Return the tensors that a repaired folder's manifest says were repaired, made again.

    None where it does not tell how.

    Raises:
        UserError: as `repair_folder`.
    """
    about = repair_of(manifest)
    if about.get("step") is None:
        return None
    step, folder = RepairStep.model_validate(about["step"]), Path(about["of"])
    factory, batches = step_parts(step, str(folder))
    with one_thread_a_worker():
        return _of_folder(folder, open_checkpoint(folder), factory, batches, step.kind)[0]


def _of_folder(
    folder: Path,
    checkpoint: Checkpoint,
    factory: Callable[[], nn.Module],
    batches: Sequence[Batch],
    kind: RepairKind,
) -> tuple[dict[str, Tensor], Repaired]:
    """Return `repaired_tensors` of a merged folder, tied ones under the name that is kept."""
    new, done = repaired_tensors(
        checkpoint, factory, batches, kind, endpoints=lambda: _endpoints(folder, _plan_of(folder))
    )
    return {checkpoint.aliases.get(name, name): tensor for name, tensor in new.items()}, done


def _seen_from_anywhere(step: RepairStep) -> dict[str, Any]:
    """Return a step as plain data, with the path of its inputs in full."""
    return step.on(str(Path(step.data).resolve())).model_dump(mode="json")


def _plan_of(folder: Path) -> Plan:
    """Return the plan that a folder was merged by."""
    manifest = read_manifest(folder)
    return make_plan(recipe_of_manifest(manifest, where=str(folder / MANIFEST)))


def _endpoints(folder: Path, plan: Plan) -> tuple[tuple[Checkpoint, ...], list[float]]:
    """Return the experts that a folder was merged from, and their shares."""
    return plan.experts, _shares(str(folder), plan)


def _shares(where: str, plan: Plan) -> list[float]:
    """Return the experts' shares in a merge, which REPAIR takes for an interpolation."""
    coefficients = [expert.coefficient for expert in plan.recipe.experts]
    if min(coefficients) < 0 or sum(coefficients) <= 0:
        raise RecipeError(
            f"{where} has the coefficients {coefficients}, between which nothing can be "
            "interpolated; re-estimate the BatchNorms (batch_norm) instead."
        )
    return [coefficient / sum(coefficients) for coefficient in coefficients]


def _told(
    kind: RepairKind,
    done: Repaired,
    batches: Sequence[Batch],
    new: Mapping[str, Tensor],
    models: Sequence[Checkpoint],
) -> dict[str, Any]:
    """Return what a manifest says of a repair; `models` are those that were merged, if known."""
    return {
        "kind": kind,
        "samples": sum(_samples(batch) for batch in batches),
        "layers": list(done.layers),
        "untouched": dict(done.untouched),
        "tensors": sorted(new),
        "warnings": _warnings(models, new),
    }


def _warnings(models: Sequence[Checkpoint], changed: Iterable[str]) -> list[str]:
    """Return what speaks against the repair, as far as the merged models show it."""
    names = [name for name in changed if name.endswith("running_mean")]
    if len(models) < 2 or not names:
        return []
    first, *others = models
    if all(torch.equal(first[name], other[name]) for name in names for other in others):
        return [
            "The merged models share one set of BatchNorm statistics, so they were trained with "
            "these frozen; new ones usually make such models worse: compare before use."
        ]
    return []


def _models_of(folder: Path) -> tuple[Checkpoint, ...]:
    """Return the models that a folder was merged from, as far as they are still there."""
    try:
        return _plan_of(folder).inputs
    except UserError:
        return ()  # no manifest, or inputs that are gone: nothing to compare


def _recipe_of(folder: Path) -> Mapping[str, object] | None:
    return dict(read_manifest(folder).recipe) if (folder / MANIFEST).is_file() else None


def _built(factory: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> nn.Module:
    module = factory()
    load_state(module, tensors)
    return module


def _stored_name(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a tensor's stored name, which may carry or lack a prefix."""
    if name in tensors:
        return name
    found = [s for s in tensors if s.endswith(f".{name}") or name.endswith(f".{s}")]
    if len(found) != 1:
        raise ModelError(
            f"{len(found) or 'No'} stored tensors could be {name!r}, which the repair changed; "
            "give a module whose names are those of the weights."
        )
    return found[0]


def _flat(name: str, new: Mapping[str, Tensor], checkpoint: Checkpoint) -> Tensor:
    return new[name].reshape(-1) if name in new else checkpoint.read(name)


def _samples(batch: Batch) -> int:
    return len(batch) if isinstance(batch, Tensor) else len(next(iter(batch.values())))
