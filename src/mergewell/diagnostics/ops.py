"""What diagnostics share: matrices of pairs, and what is measured on a plan's weights.

Shapes: K experts, O outputs, I inputs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergewell.engines.base import make_engine, one_thread_a_worker
from mergewell.plan import Plan, TensorTask
from mergewell.run import measure_weights
from mergewell.statistics.subspaces import EXACT, MatrixSubspaces, cost, measure_subspaces
from mergewell.statistics.task_vector_sums import TaskVectorSums
from mergewell.statistics.top_conflict import TopConflict
from mergewell.storage.base import Checkpoint
from mergewell.tensor_group import CHUNK

EXCLUDED = r"embed|(^|[._])(head|heads|lm_head|classifier|score|wte|wpe|pooler|text_projection)\."
"""Names of embeddings and heads, which the papers leave out of what is done to matrices."""

_READ = 8 * CHUNK
"""Elements of a tensor that a worker takes at a time; it reads a chunk of them at a time."""

_WHOLE = 1 << 26
"""Elements of all task vectors of a tensor that are held at a time where they are ranked."""

BUDGET = 1e12
"""Floating-point operations that decompositions may take: 15 seconds or more on one core."""

Rows = list[list[float | None]]
"""A matrix as plain data; None where a value is not defined."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """The subspaces of a model's task matrices, and the tensors that have none."""

    measured: Mapping[str, MatrixSubspaces]
    unmeasured: Mapping[str, str]
    """Why, by the name of each tensor of two dimensions or more that was left out."""


def measure_matrices(
    plan: Plan,
    *,
    excluded: str = EXCLUDED,
    budget: float = BUDGET,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Matrices:
    """Return the subspaces of every task matrix of a plan, one tensor of all models at a time.

    Matrices are tensors of two dimensions, and kernels [O, I, h, w] as [O, I h w]. Left out are
    names that `excluded` finds (embeddings and heads), what is copied rather than merged, and what
    the `budget` does not reach: matrices are taken in an order drawn from their names, so that
    those measured are spread over the model, and the same ones always. Vectors and numbers have no
    subspaces and are not listed. `on_progress` is called with the matrices done and their number.
    """
    left_out: dict[str, str] = {}
    wanted: list[TensorTask] = []
    for task in plan.tasks.values():
        if len(task.spec.shape) < 2 or not task.spec.dtype.is_floating_point:
            continue
        if reason := _reason(task, excluded):
            left_out[task.name] = reason
        else:
            wanted.append(task)
    spent = 0.0
    taken: list[TensorTask] = []
    for task in sorted(wanted, key=lambda t: hashlib.blake2b(t.name.encode()).digest()):
        price = cost(_two(task), len(plan.experts))
        if spent + price > budget:
            left_out[task.name] = f"over the budget of {budget:.2g} operations"
        else:
            spent += price
            taken.append(task)
    measured: dict[str, MatrixSubspaces] = {}
    for done, task in enumerate((t for t in wanted if t in taken), 1):
        matrices = _task_matrices(plan, task)
        if any(bool(matrix.any()) for matrix in matrices):
            measured[task.name] = measure_subspaces(matrices, task.coefficients, seed=seed)
        else:
            left_out[task.name] = "no expert moved it"
        if on_progress is not None:
            on_progress(done, len(taken))
    return Matrices(measured, {n: left_out[n] for n in plan.tasks if n in left_out})


def measure_task_vectors(
    plan: Plan, *, on_progress: Callable[[int], None] | None = None
) -> dict[str, TaskVectorSums]:
    """Return the sums over every floating tensor that is merged, reading each weight once.

    The plan has a base. `on_progress` is called with the bytes of one model that were just read.
    """
    tasks = [task for task in plan.tasks.values() if task.copied_from is None]
    blocks = [(task, start) for task in tasks for start in range(0, max(1, task.spec.numel), _READ)]

    def measure(block: tuple[TensorTask, int]) -> TaskVectorSums:
        task, start = block
        total = TaskVectorSums.zero(len(plan.experts))
        for first in range(start, min(start + _READ, task.spec.numel), CHUNK):
            last = min(first + CHUNK, task.spec.numel)
            base = plan.reference.read(task.name, first, last)
            experts = [expert.read(task.name, first, last) for expert in plan.experts]
            total = total + TaskVectorSums.of(base, experts)
        return total

    found: dict[str, TaskVectorSums] = {}
    with one_thread_a_worker():
        for (task, start), part in zip(blocks, make_engine().imap(measure, blocks), strict=True):
            found[task.name] = found[task.name] + part if task.name in found else part
            if on_progress is not None:
                width = task.spec.nbytes // max(1, task.spec.numel)
                on_progress(min(_READ, task.spec.numel - start) * width)
    return found


def measure_top_conflicts(
    plan: Plan, *, on_progress: Callable[[int], None] | None = None
) -> dict[str, Tensor]:
    """Return how often the largest entries of every two task vectors oppose, by tensor, [2, K, K].

    Tensors whose task vectors fit into `_WHOLE` elements are read once, larger ones in passes.
    """
    statistic = TopConflict()
    tasks = {name: task for name, task in plan.tasks.items() if task.copied_from is None}
    experts = len(plan.experts)

    def measure(task: TensorTask) -> Tensor:
        base = plan.reference.read(task.name)
        taus = torch.zeros(experts, task.spec.numel)
        for row, expert in zip(taus, plan.experts, strict=True):
            tensor = expert.read(task.name)
            if tensor.data_ptr() != base.data_ptr():
                wide = torch.promote_types(tensor.dtype, torch.float32)
                row.copy_(tensor.to(wide) - base.to(wide))
        if not bool(taus.any()):
            return torch.zeros(2, experts, experts, dtype=torch.int64)
        return statistic.of_whole(taus)

    small = [task for task in tasks.values() if task.spec.numel * experts <= _WHOLE]
    found: dict[str, Tensor] = {}
    with one_thread_a_worker():
        for task, counts in zip(small, map(measure, small), strict=True):
            found[task.name] = counts
            if on_progress is not None:
                on_progress(task.spec.nbytes)
    large = {name: task for name, task in tasks.items() if name not in found}
    if large:
        rest = measure_weights(replace(plan, tasks=large), [statistic], on_progress=on_progress)
        found |= {name: value[statistic]["conflicts"] for name, value in rest.items()}
    return {name: found[name] for name in tasks}


def pair_values(matrix: Tensor) -> list[float]:
    """Return what stands off the diagonal of [K, K] and is defined."""
    off = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
    return [float(value) for value in off[off.isfinite()]]


def mean(values: list[float]) -> float:
    """Return the mean of some numbers; nan of none."""
    return sum(values) / len(values) if values else float("nan")


def rows_of(matrix: Tensor) -> Rows:
    """Return a matrix as plain data, None for what is not finite."""
    return [[float(value) if bool(value.isfinite()) else None for value in row] for row in matrix]


def cosines_of(products: Tensor) -> Tensor:
    """Return the cosines that inner products [K, K] imply; nan where a vector is zero."""
    norms = products.diagonal().clamp(min=0).sqrt()
    norms = torch.where(norms == 0, float("nan"), norms)
    return (products / norms[:, None] / norms).clamp(-1, 1)


def distances_of(products: Tensor) -> Tensor:
    """Return the distances that inner products [K, K] imply."""
    squares = products.diagonal()
    return (squares[:, None] + squares - 2 * products).clamp(min=0).sqrt()


def percent(value: float) -> str:
    """Return a fraction in words."""
    return f"{100 * value:.2g} %"


def _reason(task: TensorTask, excluded: str) -> str:
    """Return why a tensor of two dimensions or more is left out; nothing where it is not."""
    if re.search(excluded, task.name):
        return "an embedding or a head by its name"
    if task.copied_from is not None:
        return "copied by a rule and not merged"
    if len(task.spec.shape) not in (2, 4):
        return f"{len(task.spec.shape)} dimensions: neither a matrix nor a kernel of an image"
    return "" if task.spec.numel else "it has no elements"


def _two(task: TensorTask) -> tuple[int, int]:
    outputs = task.spec.shape[0]
    return outputs, task.spec.numel // max(1, outputs)


def _task_matrices(plan: Plan, task: TensorTask) -> list[Tensor]:
    """Return every expert's task matrix [O, I]; float64 where it is decomposed exactly."""
    shape = _two(task)
    dtype = torch.float64 if min(shape) <= EXACT else torch.float32

    def wide(model: Checkpoint) -> Tensor:
        return model.read(task.name).to(dtype).reshape(shape)

    base = wide(plan.reference)
    return [wide(expert) - base for expert in plan.experts]
