"""Companion: masks, one bit an element and expert, that turn a merged model back into an expert.

expert k ~ base + r_k * (mask_k * (merged - base)), with one rescaler r_k an expert.

The file holds `NAME.mask` (uint8 [K, ceil(elements / 8)], bits packed, the first element highest)
for every merged tensor, and `rescalers` (float64 [K]); its metadata name the tasks in the order of
the rows. Shapes: K experts.
"""

from __future__ import annotations

import json
import os
import secrets
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mergewell.component import Component, Family
from mergewell.errors import CheckpointError, RecipeError, did_you_mean
from mergewell.plan import Plan, TensorTask
from mergewell.run import merge_tensors
from mergewell.storage.base import Checkpoint
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.durable import pwrite_all, sync_folder, writing
from mergewell.storage.header import build_header
from mergewell.storage.spec import TensorSpec

FORMAT = "mergewell.companion: NAME.mask bits of K experts, rescalers; beside its merged model"
SUFFIX = ".companion.safetensors"
"""How the name of a companion in a merged folder ends; it begins with the companion's own."""

RECIPE = "mergewell.recipe"
"""Key of the metadata that a merged model and its companion share."""

_RESCALERS = "rescalers"


@dataclass(frozen=True, slots=True)
class Cut:
    """What a companion keeps of one tensor."""

    masks: tuple[Tensor, ...]
    """K tensors of booleans."""
    wanted: tuple[float, ...]
    """What a rescaled, masked tensor should measure, for each expert; summed over the tensors."""
    held: tuple[float, ...]
    """What it measures before; the rescaler is the ratio of the sums."""


class Companion(Component):
    """One way to cut masks: the parameters are the fields, the work is `cut`."""

    paper: ClassVar[str] = ""

    methods: ClassVar[tuple[str, ...]] = ()
    """Methods whose merges it goes with."""

    @abstractmethod
    def cut(
        self,
        task_vectors: Sequence[Tensor],
        coefficients: Sequence[float],
        unified: Tensor,
        *,
        method: str,
    ) -> Cut:
        """Return the masks of one tensor; `unified` is merged minus base, made by `method`."""


COMPANIONS: Family[Companion] = Family("mergewell.companions", Companion, "companion")
"""All companions, by name."""


def write_companion(companion: Companion, plan: Plan, tasks: Sequence[str], path: Path) -> Path:
    """Write the companion of a plan's merge and return its path; `tasks` name the experts.

    The merge is made again in memory, a tensor at a time, so the merged model need not be there.
    The file appears complete or not at all. Size: K bits an element of the merged tensors.

    Raises:
        RecipeError: a method that the companion does not go with, no base, a coefficient that
            is not above 0, or task names that are not one for each expert, all different.
        OutputError: the file cannot be written.
    """
    require_fit(companion, plan, tasks)
    merged = {name: task for name, task in plan.tasks.items() if task.copied_from is None}
    specs = [
        TensorSpec(f"{name}.mask", torch.uint8, (len(tasks), -(-task.spec.numel // 8)))
        for name, task in merged.items()
    ]
    metadata = {
        "format": FORMAT,
        "companion": companion.component_name(),
        "parameters": json.dumps(companion.parameters()),
        "tasks": json.dumps(list(tasks)),
        "base": str(Path(str(plan.recipe.base)).resolve()),
        RECIPE: plan.recipe.to_yaml(),
    }
    content, header = build_header(
        [*specs, TensorSpec(_RESCALERS, torch.float64, (len(tasks),))], metadata
    )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            try:
                pwrite_all(descriptor, memoryview(content), 0)
                wanted, held = [0.0] * len(tasks), [0.0] * len(tasks)
                for name, cut in _cuts(companion, plan, merged):
                    place = header.offsets[f"{name}.mask"]
                    pwrite_all(descriptor, memoryview(_packed(cut.masks)), place)
                    wanted = [a + b for a, b in zip(wanted, cut.wanted, strict=True)]
                    held = [a + b for a, b in zip(held, cut.held, strict=True)]
                ratios = [a / b if b > 0 else 0.0 for a, b in zip(wanted, held, strict=True)]
                last = np.array(ratios, dtype="<f8").tobytes()
                pwrite_all(descriptor, memoryview(last), header.offsets[_RESCALERS])
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return path


def expert_state(
    merged: Checkpoint, companion: str | Path, task: str, *, base: Checkpoint | None = None
) -> dict[str, Tensor]:
    """Return the tensors of one expert, made from the merged model and its companion.

    Tensors without a mask are the merged model's. `base` is opened where the companion says it
    was, unless given.

    Raises:
        CheckpointError: no companion file, one of another merge, or a file that does not fit.
        RecipeError: an unknown task.
    """
    return dict(expert_tensors(merged, companion, task, base=base))


def expert_tensors(
    merged: Checkpoint, companion: str | Path, task: str, *, base: Checkpoint | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of `expert_state` by name, one at a time.

    Raises:
        CheckpointError, RecipeError: as `expert_state`.
    """
    masks = open_companion(companion)
    if merged.metadata.get(RECIPE) != masks.metadata.get(RECIPE):
        raise CheckpointError(
            f"{companion} belongs to another merge than {merged.path}: their recipes differ; make "
            "both from one plan."
        )
    tasks: list[str] = json.loads(masks.metadata["tasks"])
    if task not in tasks:
        raise RecipeError(f"{companion} knows no task {task!r}: {did_you_mean(task, tasks)}")
    row = tasks.index(task)
    start = base if base is not None else base_of(masks)
    rescaler = float(masks[_RESCALERS][row])
    for name in merged:
        if f"{name}.mask" in masks:
            yield name, _restored(merged[name], start, masks, name, row, rescaler)
        else:
            yield name, merged[name]


def open_companion(path: str | Path) -> Checkpoint:
    """Open the file of a companion.

    Raises:
        CheckpointError: it is none.
    """
    masks = open_checkpoint(path)
    if not masks.metadata.get("format", "").startswith("mergewell.companion"):
        raise CheckpointError(f"{path} is no companion; write one with `merge --companion`.")
    return masks


def base_of(masks: Checkpoint) -> Checkpoint:
    """Open the base that an opened companion's merge started from.

    Raises:
        CheckpointError: it is not where it was.
    """
    return open_checkpoint(masks.metadata["base"])


def absolute(tensor: Tensor) -> float:
    """Return the sum of magnitudes, in float64."""
    return float(tensor.abs().sum(dtype=torch.float64))


def _restored(
    merged: Tensor, base: Checkpoint, masks: Checkpoint, name: str, row: int, rescaler: float
) -> Tensor:
    bits = masks[f"{name}.mask"][row]
    unpacked = np.unpackbits(bits.numpy(), count=merged.numel())
    mask = torch.from_numpy(unpacked).view(merged.shape).bool()
    compute = _wider(merged.dtype)
    start = base[name].to(compute)
    kept = torch.where(mask, merged.to(compute) - start, 0.0)
    return (start + rescaler * kept).to(merged.dtype)


def _cuts(
    companion: Companion, plan: Plan, merged: Mapping[str, TensorTask]
) -> Iterator[tuple[str, Cut]]:
    for name, tensor in merge_tensors(plan, list(merged)):
        task = merged[name]
        compute = _wider(tensor.dtype)
        base = plan.reference[name].to(compute)
        yield (
            name,
            companion.cut(
                [expert[name].to(compute) - base for expert in plan.experts],
                task.coefficients,
                tensor.to(compute) - base,
                method=task.method.component_name(),
            ),
        )


def _packed(masks: Sequence[Tensor]) -> bytes:
    rows: list[Any] = [np.packbits(mask.reshape(-1).numpy()) for mask in masks]
    return b"".join(row.tobytes() for row in rows)


def _wider(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which task vectors are made: one step wider than stored."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def require_fit(companion: Companion, plan: Plan, tasks: Sequence[str]) -> None:
    """Require that a companion goes with a plan's merge.

    Raises:
        RecipeError: it does not; as `write_companion`.
    """
    name, method = companion.component_name(), plan.recipe.method.name
    if method not in companion.methods:
        raise RecipeError(
            f"{name} goes with merges by {' or '.join(companion.methods)}, not by {method}; merge "
            "by one of these."
        )
    if plan.base is None:
        raise RecipeError(f"{name} masks what the merge adds to the base; name the base.")
    if len(tasks) != len(plan.experts) or len(set(tasks)) != len(tasks):
        raise RecipeError(
            f"{name} needs one name for each of {len(plan.experts)} experts, all different, but "
            f"got {', '.join(tasks) or 'none'}."
        )
    if any(min(t.coefficients) <= 0 for t in plan.tasks.values() if t.copied_from is None):
        raise RecipeError(
            f"{name} cannot give back an expert whose coefficient is not above 0; leave it out."
        )
