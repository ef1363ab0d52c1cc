"""Run: carry out a plan. Statistics passes, then the merge, block by block, then the commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Lock
from types import MappingProxyType

import torch
from torch import Tensor

from mergewell.blocks import (
    FUSED,
    Block,
    Merged,
    Values,
    blocks_of,
    fused_blocks_of,
    group_of,
    is_raw,
    merge_block,
    raw_of,
    read,
)
from mergewell.changes import UNCHANGED, Change, changes_in, notes_of, summary
from mergewell.device import CPU, Device, make_device
from mergewell.engines.base import Engine, make_engine, one_thread_a_worker
from mergewell.errors import CheckpointError, PlanError
from mergewell.kernels import base as kernels
from mergewell.plan import BLOCK, Plan, TensorTask
from mergewell.statistics.base import State, WeightStatistic, joined
from mergewell.storage.manifest import Algorithm, Manifest, versions
from mergewell.storage.passing_hash import PassingHash, hash_while_reading
from mergewell.storage.writer import CheckpointWriter, FileWriter, ShardLayout
from mergewell.tensor_group import Value

OnProgress = Callable[[int], None]
"""Called with the bytes of result just written."""

_STATISTIC = 8
"""Blocks of one model each, about, that a torch form of a statistic takes at a time.

Its state costs more than a block does, but its temporaries are as wide as all models are."""

_BATCH = 1 << 26
"""Elements of the tensors whose statistics are made before they are merged together."""


def run(
    plan: Plan,
    out: str | Path,
    *,
    workers: int | None = None,
    resume: bool = False,
    block: int = BLOCK,
    algorithm: Algorithm = "xxh3-128",
    device: str | Device = "cpu",
    beside: Mapping[str, Callable[[Path], object]] = MappingProxyType({}),
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Carry out a plan: the complete folder `out` appears, or nothing does.

    `device` is where the arithmetic is done, such as "cuda": its last bit may differ from that of
    the CPU, so the manifest names the device and only a run on such a one is resumed.

    `beside` names further files of the output, such as a companion, and what writes each durably.

    With `resume`, files that an earlier run or shard job finished are kept: the unit of resuming
    is a file (`shard_bytes` in the recipe makes them smaller).

    Raises:
        OutputError: `out` exists, or cannot hold the result.
        CheckpointError: NaN, Inf or unequal integers in the inputs, or one changed meanwhile.
        MethodError: a method broke its promise.
        RecipeError: there is no such device here.
    """
    from mergewell.repair import mended  # which merges in memory, by this module

    where = make_device(device) if isinstance(device, str) else device
    began = time.perf_counter()
    engine = make_engine(workers)
    key = plan.resume_key() if where.fused else f"{plan.resume_key()}-{where.name}"
    with (
        one_thread_a_worker(),
        CheckpointWriter(
            Path(out), plan.layouts, metadata=plan.metadata, key=key, resume=resume,
            algorithm=algorithm,
        ) as writer,
    ):  # fmt: skip
        before = sum(float(notes.get("seconds", 0.0)) for notes in writer.notes)
        plan = mended(plan)
        known = [f for f in writer.recorded_inputs if f.hash.startswith(f"{algorithm}:")]
        hashes = hash_while_reading(plan.inputs, algorithm, known=[Path(f.path) for f in known])
        write_files(
            plan, engine, writer.pending, writer, block=block, device=where,
            on_progress=on_progress,
        )  # fmt: skip
        changes = changes_in(writer.notes)
        if not any(change.changed for change in changes.values()) and not plan.recipe.restacks:
            writer.abort(keep=False)
            raise PlanError(
                "The result equals the base in every tensor; check the coefficients, the density "
                "and that the experts are not the base itself."
            )
        for file in plan.reference.side_files:
            writer.add_file(file.name, plan.reference.side_file(file))
        for name, write in beside.items():
            writer.add_written(name, write)
        inputs = [*known, *engine.imap(PassingHash.record, hashes), *plan.data_records(algorithm)]
        return writer.commit(
            {
                "recipe": plan.recipe.as_data(),
                "inputs": sorted(inputs, key=lambda file: file.path),
                "tensors": len(plan.tasks),
                **summary(changes),
                **({} if plan.mended is None else {"repair": plan.mended.about}),
                "seed": plan.recipe.seed,
                "versions": {**versions(), "device": where.name},
                "directory": str(Path.cwd()),
                "seconds": round(before + time.perf_counter() - began, 3),
            }
        )


def write_files(
    plan: Plan,
    engine: Engine,
    layouts: Sequence[ShardLayout],
    writer: FileWriter,
    *,
    block: int = BLOCK,
    device: Device = CPU,
    on_progress: OnProgress | None = None,
) -> None:
    """Merge the tensors of some files of the result and write them, file by file.

    Raises:
        OutputError, CheckpointError, MethodError: as `run`.
    """
    if not layouts:
        return
    began = time.perf_counter()
    _check_copies(plan)
    values = _model_statistics(plan, engine, block, device)
    turn = Lock()  # the system lets one thread write to a file at a time anyhow
    for layout in layouts:
        tasks = [plan.tasks[spec.name] for spec in layout.specs]
        changes: dict[str, Change] = {}
        for merge, blocks in _merges(plan, engine, tasks, values, block, device):

            def write(part: Block, merge: Callable[[Block], Merged] = merge) -> Change:
                merged = merge(part)  # written by who merged it: nothing waits to be handed over
                with turn:
                    writer.write(part.task.name, part.start, merged.tensor)
                    if on_progress is not None:
                        on_progress(merged.tensor.nbytes)
                return merged.change

            for part, change in zip(blocks, engine.each(write, blocks), strict=True):
                name = part.task.name
                changes[name] = changes.get(name, UNCHANGED) + change
        done = time.perf_counter()
        writer.finish(layout.file, {**notes_of(changes), "seconds": done - began})
        began = done


def merge_tensors(
    plan: Plan, names: Collection[str] | None = None, *, block: int = BLOCK
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, merged tensor) for each task, or for those named: the same merge in memory.

    A repair that the recipe asks for is not made: `mergewell.repair.mended` makes it of this.
    """
    engine = make_engine()
    _check_copies(plan)
    with one_thread_a_worker():
        values = _model_statistics(plan, engine, block)
        tasks = [task for task in plan.tasks.values() if names is None or task.name in names]
        for merge, blocks in _merges(plan, engine, tasks, values, block):
            results = engine.imap(merge, blocks)
            for name, parts in groupby(results, key=lambda merged: merged.block.task.name):
                flat = torch.cat([part.tensor for part in parts])
                yield name, flat.view(plan.tasks[name].spec.shape)


def measure_weights(
    plan: Plan,
    statistics: Sequence[WeightStatistic],
    *,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Values]:
    """Return statistics of every floating tensor that the models share, by tensor name."""
    engine = make_engine(workers)
    tasks = [task for task in plan.tasks.values() if task.copied_from is None]
    values: dict[str, Values] = {}
    with one_thread_a_worker():
        for batch in _batches(tasks, every=True):
            values |= _measure(plan, engine, dict.fromkeys(statistics, batch), BLOCK)
            if on_progress is not None:
                on_progress(sum(task.spec.nbytes for task in batch))
    return values


def _merges(
    plan: Plan,
    engine: Engine,
    tasks: Sequence[TensorTask],
    model_values: dict[str, Values],
    block: int,
    device: Device = CPU,
) -> Iterator[tuple[Callable[[Block], Merged], list[Block]]]:
    """Yield what merges a block, and blocks to merge: those of few enough tensors at a time."""
    for batch in _batches(tasks):
        values = _tensor_statistics(plan, engine, batch, block, device)
        blocks = [part for task in batch for part in fused_blocks_of(plan, task, block, device)]

        def merge(part: Block, values: dict[str, Values] = values) -> Merged:
            name = part.task.name
            known = {**model_values.get(name, {}), **values.get(name, {})}
            return merge_block(plan, part, known, device)

        yield merge, blocks


def _batches(tasks: Sequence[TensorTask], *, every: bool = False) -> Iterator[list[TensorTask]]:
    """Cut tasks so that few tensors' statistics are held; without `every`, where there are any."""
    batch: list[TensorTask] = []
    elements = 0
    for task in tasks:
        counts = every or (task.copied_from is None and bool(task.method.statistics()))
        size = task.spec.numel if counts else 0
        if size and batch and elements + size > _BATCH:
            yield batch
            batch, elements = [], 0
        batch.append(task)
        elements += size
    if batch:
        yield batch


def _model_statistics(
    plan: Plan, engine: Engine, block: int, device: Device = CPU
) -> dict[str, Values]:
    """Make the statistics whose scope is the whole model, each over the tensors that need it."""
    users: dict[WeightStatistic, list[TensorTask]] = {}
    for task in plan.tasks.values():
        if task.copied_from is None:
            for statistic in task.method.statistics():
                if statistic.scope == "model":
                    users.setdefault(statistic, []).append(task)
    return _measure(plan, engine, users, block, device)


def _tensor_statistics(
    plan: Plan, engine: Engine, tasks: Sequence[TensorTask], block: int, device: Device
) -> dict[str, Values]:
    """Make the statistics of single tensors; small ones get theirs as they are merged."""
    users: dict[WeightStatistic, list[TensorTask]] = {}
    for task in tasks:
        large = task.spec.numel >= kernels.SMALLEST or len(blocks_of(task, block)) > 1
        if task.copied_from is None and large:
            for statistic in task.method.statistics():
                if statistic.scope == "tensor":
                    users.setdefault(statistic, []).append(task)
    return _measure(plan, engine, users, block, device)


def _measure(
    plan: Plan,
    engine: Engine,
    users: Mapping[WeightStatistic, Sequence[TensorTask]],
    block: int,
    device: Device = CPU,
) -> dict[str, Values]:
    values: dict[str, dict[WeightStatistic, Value]] = {}
    for statistic, tasks in users.items():
        program = kernels.program(statistic) if device.fused else None
        whole = statistic.scope == "model"  # all tensors make one value together, in one form
        raw = [task for task in tasks if program is not None and is_raw(plan, task, small=whole)]
        if whole and (len(raw) < len(tasks) or not any(is_raw(plan, task) for task in raw)):
            raw = []
        if program is not None and raw:
            _pass_over(plan, engine, program, raw, block, values, device)
        rest = [task for task in tasks if task not in raw]
        _pass_over(plan, engine, statistic, rest, block, values, device)
    return dict(values)


def _pass_over(
    plan: Plan,
    engine: Engine,
    form: WeightStatistic | kernels.Program,
    tasks: Sequence[TensorTask],
    block: int,
    values: dict[str, dict[WeightStatistic, Value]],
    device: Device,
) -> None:
    """Make one statistic of some tensors, in its torch or in its fused form.

    On another device its blocks are added up there; states are joined and finished here.
    """
    done: State = {}

    def update(part: Block, index: int) -> State:
        if isinstance(form, WeightStatistic):
            group, known = group_of(plan, part, {}, device), device.all_up(done)
            with device.working():
                return device.all_down(form.update(known, group, index))
        raw = raw_of(plan, part, {}, small=True)
        assert raw is not None  # `is_raw` said so
        return form.update(done, raw, index)

    few = max(1, _STATISTIC // len(plan.inputs))
    size = (few if isinstance(form, WeightStatistic) else FUSED) * block
    for index in range(form.passes):
        wanted = [task for task in tasks if form.wanted(done, task.name, index)]
        blocks = [part for task in wanted for part in blocks_of(task, size)]
        summed: dict[str, Tensor] = {}
        for state in engine.imap(partial(update, index=index), blocks):
            summed = joined(summed, state)
        done = form.advance(done, summed, index)
    statistic = form if isinstance(form, WeightStatistic) else form.statistic
    for task in tasks:
        value = form.value(done, task.name, task.spec.numel)
        values.setdefault(task.name, {})[statistic] = value


def _check_copies(plan: Plan) -> None:
    """Refuse integer tensors that differ between the models: no method can merge them."""
    for task in plan.tasks.values():
        if task.copied_from != 0 or task.spec.dtype.is_floating_point:
            continue
        whole = Block(task, 0, task.spec.numel)
        for expert in plan.experts:
            if task.name not in expert:
                continue
            if not torch.equal(
                read(plan.reference, task.name, whole), read(expert, task.name, whole)
            ):
                if plan.recipe.rule_for(task.name) is not None:
                    continue
                raise CheckpointError(
                    f"{expert.path}: the integers of {task.name} differ from those of "
                    f"{plan.reference.path}; choose by a rule {{match: {task.name!r}, method: "
                    "{name: keep, model: 0}}."
                )
