"""Companion: a file beside a merged model that gives each expert back, or that routes to them.

Its metadata name the companion, its parameters, the base, the recipe, and the tasks in the order
of the rows. What a `MaskCompanion` holds is masks, one bit an element and expert:

expert k ~ base + r_k * (mask_k * (merged - base)), with one rescaler r_k an expert

as `NAME.mask` (uint8 [K, ceil(elements / 8)], bits packed, the first element highest) for every
merged tensor, and `rescalers` (float64 [K]). Shapes: K experts.
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

FORMAT = "mergewell.companion: what K experts have of their own, beside their merged model"
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
    """One kind of file beside a merge: the parameters are the fields, the work is `write`."""

    paper: ClassVar[str] = ""

    methods: ClassVar[tuple[str, ...]] = ()
    """Methods whose merges it goes with; all if there are none."""

    @abstractmethod
    def specs(self, plan: Plan) -> list[TensorSpec]:
        """Return what the file will hold of a plan's merge."""

    @abstractmethod
    def tensors(self, plan: Plan) -> Iterator[tuple[str, Tensor]]:
        """Yield all that `specs` names, each when it is made."""

    @abstractmethod
    def holds(self, held: Checkpoint, name: str) -> bool:
        """Return whether the opened file has something for a tensor of the merge."""

    @abstractmethod
    def restored(
        self, held: Checkpoint, name: str, row: int, *, merged: Tensor, base: Tensor
    ) -> Tensor:
        """Return one tensor of the expert in a row, of a tensor that the opened file `holds`."""


class MaskCompanion(Companion):
    """One way to cut masks: the parameters are the fields, the work is `cut`."""

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

    def specs(self, plan: Plan) -> list[TensorSpec]:
        """Return masks by tensor, and the rescalers."""
        count = len(plan.experts)
        masks = [
            TensorSpec(f"{name}.mask", torch.uint8, (count, -(-task.spec.numel // 8)))
            for name, task in merged_tasks(plan).items()
        ]
        return [*masks, TensorSpec(_RESCALERS, torch.float64, (count,))]

    def tensors(self, plan: Plan) -> Iterator[tuple[str, Tensor]]:
        """Yield the packed masks, and the rescalers at the end; the merge is made again."""
        count = len(plan.experts)
        wanted, held = [0.0] * count, [0.0] * count
        for name, cut in _cuts(self, plan, merged_tasks(plan)):
            yield f"{name}.mask", _packed(cut.masks)
            wanted = [a + b for a, b in zip(wanted, cut.wanted, strict=True)]
            held = [a + b for a, b in zip(held, cut.held, strict=True)]
        ratios = [a / b if b > 0 else 0.0 for a, b in zip(wanted, held, strict=True)]
        yield _RESCALERS, torch.tensor(ratios, dtype=torch.float64)

    def holds(self, held: Checkpoint, name: str) -> bool:
        """Return whether there is a mask."""
        return f"{name}.mask" in held

    def restored(
        self, held: Checkpoint, name: str, row: int, *, merged: Tensor, base: Tensor
    ) -> Tensor:
        """Return the base and what the mask keeps of the merge, rescaled."""
        rescaler = float(held[_RESCALERS][row])
        bits = held[f"{name}.mask"][row]
        unpacked = np.unpackbits(bits.numpy(), count=merged.numel())
        mask = torch.from_numpy(unpacked).view(merged.shape).bool()
        compute = wider(merged.dtype)
        start = base.to(compute)
        kept = torch.where(mask, merged.to(compute) - start, 0.0)
        return (start + rescaler * kept).to(merged.dtype)


COMPANIONS: Family[Companion] = Family("mergewell.companions", Companion, "companion")
"""All companions, by name."""


def write_companion(companion: Companion, plan: Plan, tasks: Sequence[str], path: Path) -> Path:
    """Write the companion of a plan's merge and return its path; `tasks` name the experts.

    Tensors are made one at a time, from the plan's inputs, so the merged model need not be there.
    The file appears complete or not at all. Size of masks: K bits an element.

    Raises:
        RecipeError: a method that the companion does not go with, no base, a coefficient that
            is not above 0, or task names that are not one for each expert, all different.
        OutputError: the file cannot be written.
    """
    require_fit(companion, plan, tasks)
    metadata = {
        "format": FORMAT,
        "companion": companion.component_name(),
        "parameters": json.dumps(companion.parameters()),
        "tasks": json.dumps(list(tasks)),
        "base": str(Path(str(plan.recipe.base)).resolve()),
        RECIPE: plan.recipe.to_yaml(),
    }
    content, header = build_header(companion.specs(plan), metadata)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            try:
                pwrite_all(descriptor, memoryview(content), 0)
                for name, tensor in companion.tensors(plan):
                    pwrite_all(descriptor, _bytes(tensor), header.offsets[name])
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
    held = open_companion(companion)
    require_pair(merged, held)
    tasks: list[str] = json.loads(held.metadata["tasks"])
    if task not in tasks:
        raise RecipeError(f"{companion} knows no task {task!r}: {did_you_mean(task, tasks)}")
    row, own = tasks.index(task), companion_of(held)
    start = base if base is not None else base_of(held)
    for name in merged:
        tensor = merged[name]
        if own.holds(held, name):
            tensor = own.restored(held, name, row, merged=tensor, base=start[name])
        yield name, tensor


def open_companion(path: str | Path) -> Checkpoint:
    """Open the file of a companion.

    Raises:
        CheckpointError: it is none.
    """
    masks = open_checkpoint(path)
    if masks.metadata.get("format", "").startswith("mergewell.surgery"):
        raise CheckpointError(
            f"{path} corrects what a network gives and restores no weights; make the module of a "
            "task with mergewell.surgery.companion.load_corrected."
        )
    if not masks.metadata.get("format", "").startswith("mergewell.companion"):
        raise CheckpointError(f"{path} is no companion; write one with `merge --companion`.")
    return masks


def companion_of(held: Checkpoint) -> Companion:
    """Return the companion that wrote an opened file, with its parameters.

    Raises:
        RecipeError: this release knows no such companion, or no such parameter.
    """
    return COMPANIONS.build(held.metadata["companion"], json.loads(held.metadata["parameters"]))


def require_pair(merged: Checkpoint, held: Checkpoint) -> None:
    """Require that an opened companion belongs to a merged model.

    Raises:
        CheckpointError: it is one of another merge.
    """
    if merged.metadata.get(RECIPE) != held.metadata.get(RECIPE):
        raise CheckpointError(
            f"{held.path} belongs to another merge than {merged.path}: their recipes differ; make "
            "both from one plan."
        )


def base_of(masks: Checkpoint) -> Checkpoint:
    """Open the base that an opened companion's merge started from.

    Raises:
        CheckpointError: it is not where it was.
    """
    return open_checkpoint(masks.metadata["base"])


def absolute(tensor: Tensor) -> float:
    """Return the sum of magnitudes, in float64."""
    return float(tensor.abs().sum(dtype=torch.float64))


def merged_tasks(plan: Plan) -> dict[str, TensorTask]:
    """Return what is merged, and not copied, by name."""
    return {name: task for name, task in plan.tasks.items() if task.copied_from is None}


def _cuts(
    companion: MaskCompanion, plan: Plan, merged: Mapping[str, TensorTask]
) -> Iterator[tuple[str, Cut]]:
    for name, tensor in merge_tensors(plan, list(merged)):
        task = merged[name]
        compute = wider(tensor.dtype)
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


def _packed(masks: Sequence[Tensor]) -> Tensor:
    rows: list[Any] = [np.packbits(mask.reshape(-1).numpy()) for mask in masks]
    return torch.from_numpy(np.stack(rows))


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def wider(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which task vectors are made: one step wider than stored."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def require_fit(companion: Companion, plan: Plan, tasks: Sequence[str]) -> None:
    """Require that a companion goes with a plan's merge.

    Raises:
        RecipeError: it does not; as `write_companion`.
    """
    name, method = companion.component_name(), plan.recipe.method.name
    if companion.methods and method not in companion.methods:
        raise RecipeError(
            f"{name} goes with merges by {' or '.join(companion.methods)}, not by {method}; merge "
            "by one of these."
        )
    if plan.base is None:
        raise RecipeError(f"{name} holds what is added to the base; name the base.")
    if len(tasks) != len(plan.experts) or len(set(tasks)) != len(tasks):
        raise RecipeError(
            f"{name} needs one name for each of {len(plan.experts)} experts, all different, but "
            f"got {', '.join(tasks) or 'none'}."
        )
    masked = isinstance(companion, MaskCompanion)
    if masked and any(min(task.coefficients) <= 0 for task in merged_tasks(plan).values()):
        raise RecipeError(
            f"{name} cannot give back an expert whose coefficient is not above 0; leave it out."
        )
