"""Blocks: the pieces that a merge is carried out in, and how one is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from mergewell.changes import UNCHANGED, Change, change_of
from mergewell.device import CPU, Device
from mergewell.errors import CheckpointError, MethodError, PlanError
from mergewell.kernels import base as kernels
from mergewell.plan import BLOCK, Plan, TensorTask
from mergewell.statistics.base import WeightStatistic
from mergewell.storage.base import Checkpoint
from mergewell.tensor_group import TensorGroup, Value

Values = Mapping[WeightStatistic, Value]
"""What statistics give for one tensor."""


@dataclass(frozen=True, slots=True)
class Block:
    """Elements [start, stop) of one task's tensor, flattened."""

    task: TensorTask
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Merged:
    """A block of the result, in its stored dtype, flat, and how far it is from the base's."""

    block: Block
    tensor: Tensor
    change: Change


FUSED = 32
"""Blocks that a fused form takes at a time: it keeps to the cache by itself, calls cost.

After such a block nothing of Python is in the cache, so that a call costs 150 to 250 us."""

_FAR = 8
"""Blocks that another device takes at a time: each call and copy costs, its temporaries too."""

_LARGEST = BLOCK
"""Elements that the torch form takes at most of a block that the fused one did not cover."""


def blocks_of(task: TensorTask, block: int) -> list[Block]:
    """Return the blocks of one tensor: cut by elements, by whole rows, or not at all."""
    numel = task.spec.numel
    size = block
    if task.copied_from is None and task.method.needs.granularity != "element":
        size = max(1, numel)
        if task.method.needs.granularity == "row" and len(task.spec.shape) > 1:
            row = max(1, numel // task.spec.shape[0])
            size = max(1, block // row) * row
    return [Block(task, s, min(s + size, numel)) for s in range(0, numel, size)] or [
        Block(task, 0, 0)
    ]


def fused_blocks_of(plan: Plan, task: TensorTask, block: int, device: Device = CPU) -> list[Block]:
    """Return the blocks of one tensor for its fused form or device, or else of `blocks_of`."""
    if task.copied_from is not None:
        return blocks_of(task, block)
    if not device.fused:
        return blocks_of(task, _FAR * block)
    fused = kernels.has_form(task.method) and is_raw(plan, task, rows=True)
    return blocks_of(task, FUSED * block if fused else block)


def is_raw(plan: Plan, task: TensorTask, *, rows: bool = False, small: bool = False) -> bool:
    """Return whether fused forms can take this tensor as it is stored.

    `rows` for those of rows; `small` where a large tensor has the compiled code loaded anyhow.
    """
    if task.copied_from is not None:
        return False
    if task.method.needs.granularity not in ("element", "row" if rows else "element"):
        return False
    if task.spec.numel < (1 if small else kernels.SMALLEST):
        return False
    if task.spec.dtype not in kernels.STORED:
        return False
    return all(model.spec(task.name).dtype == task.spec.dtype for model in plan.inputs)


def merge_block(plan: Plan, block: Block, values: Values, device: Device = CPU) -> Merged:
    """Return one block of the result, in its fused form where there is one.

    The inputs and the result lie in the host's memory. On a device other than the CPU it is
    always the torch form, whose bits may then differ in the last place from the CPU's.

    Raises:
        CheckpointError: NaN or Inf in an input.
        PlanError: the result overflows the dtype that it is to be stored in.
        MethodError: the method broke its promise.
    """
    task = block.task
    reference = plan.reference
    if plan.mended is not None and task.name in plan.mended.tensors:
        tensor = plan.mended.tensors[task.name].reshape(-1)[block.start : block.stop]
        return Merged(block, tensor, change_of(tensor, read(reference, task.name, block)))
    if task.copied_from is not None:
        model = plan.models[task.copied_from]
        tensor = read(model, task.name, block)
        if reference.spec(task.name).shape != task.spec.shape:
            return Merged(block, tensor, Change(changed=True))
        return Merged(block, tensor, change_of(tensor, read(reference, task.name, block)))
    raw = raw_of(plan, block, values) if device.fused else None
    fused = None if raw is None else kernels.merge(task.method, raw)
    if raw is not None and fused is not None:
        if not fused.finite:
            if kernels.not_finite(raw):
                explain_not_finite(plan, task.name)
            _explain_overflow(block, None)
        change = Change(fused.changed, fused.moved, fused.original)
        return Merged(block, kernels.as_tensor(fused.out), change)
    pieces = _pieces(block) if raw is not None else [block]
    if len(pieces) > 1:
        merged = [merge_block(plan, piece, values, device) for piece in pieces]
        change = sum((piece.change for piece in merged), UNCHANGED)
        return Merged(block, torch.cat([piece.tensor for piece in merged]), change)
    group = group_of(plan, block, values, device)
    with device.working():
        return _merge_group(plan, block, group, device)


def _pieces(block: Block) -> list[Block]:
    """Cut a block that was meant for a fused form, by whole rows, so that the torch form fits."""
    shape, start, stop = block.task.spec.shape, block.start, block.stop
    row = 1
    if block.task.method.needs.granularity != "element":
        row = block.task.spec.numel // (shape[0] if len(shape) > 1 else 1)
    size = max(1, _LARGEST // row) * row
    return [Block(block.task, s, min(s + size, stop)) for s in range(start, stop, size)]


def _merge_group(plan: Plan, block: Block, group: TensorGroup, device: Device) -> Merged:
    """Return one block of the result by the method's torch form."""
    task = block.task
    if not _all_finite(group):
        explain_not_finite(plan, task.name)
    result = task.method.merge(group)
    if result.shape != group.experts[0].shape or result.dtype != group.experts[0].dtype:
        raise MethodError(
            f"{task.treatment} gave {result.dtype} {list(result.shape)} for {task.name}, but "
            f"{group.experts[0].dtype} {list(group.experts[0].shape)} was due."
        )
    stored = result.to(task.spec.dtype).flatten()
    if not bool(torch.isfinite(stored).all()):
        _explain_overflow(block, result)
    original = device.up(read(plan.reference, task.name, block))
    wide = group.base.flatten() if group.base is not None else None
    return Merged(block, device.down(stored), change_of(stored, original, wide))


def raw_of(
    plan: Plan, block: Block, values: Values, *, small: bool = False
) -> kernels.RawBlock | None:
    """Return the block as it is stored, where a fused form can take it so; see `is_raw`."""
    task = block.task
    # no fused form sees a calibration
    if task.method.needs.calibration or not is_raw(plan, task, rows=True, small=small):
        return None
    shape = task.spec.shape
    tensors = [read(model, task.name, block) for model in plan.inputs]
    return kernels.raw_block(
        task.name,
        tensors[1:] if plan.base is not None else tensors,
        tensors[0] if plan.base is not None else None,
        coefficients=task.coefficients,
        seed=plan.recipe.seed,
        offset=block.start,
        numel=task.spec.numel,
        statistics=values,
        reference=read(plan.reference, task.name, block),
        row=task.spec.numel // shape[0] if len(shape) > 1 and shape[0] else None,
        smallest=1 if small else kernels.SMALLEST,
    )


def group_of(plan: Plan, block: Block, values: Values, device: Device = CPU) -> TensorGroup:
    """Return the block of every model in the dtype to compute in, on the device."""
    task = block.task
    dtype = compute_dtype([model.spec(task.name).dtype for model in plan.inputs])
    shape = (-1,)
    if task.method.needs.granularity != "element" and task.spec.shape:
        shape = (-1, *task.spec.shape[1:])

    def wide(model: Checkpoint) -> Tensor:
        stored = device.up(read(model, task.name, block))
        with device.working():
            return stored.to(dtype).view(shape)

    return TensorGroup(
        name=task.name,
        experts=tuple(wide(expert) for expert in plan.experts),
        coefficients=device.up(torch.tensor(task.coefficients, dtype=dtype)),
        base=wide(plan.base) if plan.base is not None else None,
        seed=plan.recipe.seed,
        offset=block.start,
        numel=task.spec.numel,
        statistics={statistic: device.all_up(value) for statistic, value in values.items()},
        calibration=device.all_up(_calibration_of(plan, block)),
    )


def _calibration_of(plan: Plan, block: Block) -> Mapping[str, Tensor]:
    """Return what the plan's calibration says of a block's rows; nothing where nobody asks."""
    task = block.task
    wanted = task.method.needs.calibration
    if plan.guidance is None or not wanted or not task.spec.numel:
        return {}
    row = task.spec.numel // task.spec.shape[0]
    return plan.guidance.values(task.name, wanted, block.start // row, block.stop // row)


def compute_dtype(stored: Sequence[torch.dtype]) -> torch.dtype:
    """Return the dtype to compute in: one step wider than the widest stored one."""
    wide = any(dtype in (torch.float32, torch.float64) for dtype in stored)
    return torch.float64 if wide else torch.float32


def read(model: Checkpoint, name: str, block: Block) -> Tensor:
    """Return a block of one model, flat, as it is stored."""
    return model.read(name, block.start, block.stop)


def _all_finite(group: TensorGroup) -> bool:
    tensors = [*group.experts, *([group.base] if group.base is not None else [])]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def explain_not_finite(plan: Plan, name: str) -> NoReturn:
    """Say which model's tensor holds NaN or Inf, and how many.

    Raises:
        CheckpointError: always, unless no model does.
    """
    for model in plan.inputs:
        whole = model.read(name).to(torch.float64)
        if bad := int((~torch.isfinite(whole)).sum()):
            raise CheckpointError(
                f"{model.path}: {name} holds {bad} NaN or Inf values; repair the file, or keep "
                "another model's tensor by a rule."
            )
    raise MethodError(f"{name}: values that were not finite are finite now; did a file change?")


def _explain_overflow(block: Block, result: Tensor | None) -> NoReturn:
    """Say why a merged block is not finite though its inputs are."""
    if result is not None and not bool(torch.isfinite(result).all()):
        raise MethodError(f"{block.task.treatment} gave NaN or Inf for {block.task.name}.")
    raise PlanError(
        f"{block.task.name}: the merged values overflow {block.task.spec.dtype}; set dtype: "
        "bfloat16 or float32, or lower the coefficients."
    )
