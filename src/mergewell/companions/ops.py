"""What companions of low-rank experts share: the file, and an expert given back from it.

For every matrix that is merged, folded to [O, I] as it is stored, the file holds the longest
singular triplets of each task vector: `NAME.left` [K, O, r], `NAME.values` [K, r] and `NAME.right`
[K, I, r], those that an expert lacks filled up with zeros; and of an `X.weight` with a merged
`X.bias` the changes of the bias, `X.weight.bias` [K, O].
Shapes: K experts, O rows, I columns, r directions.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from mergewell import linalg
from mergewell.companions.base import Companion, merged_tasks, wider
from mergewell.errors import RecipeError
from mergewell.matrices import EXCLUDE, Exclude, is_matrix
from mergewell.plan import Plan
from mergewell.statistics.ops import rows_of
from mergewell.storage.base import Checkpoint
from mergewell.storage.spec import TensorSpec


class LowRankCompanion(Companion):
    """A companion that holds each expert's matrices as the base's plus a few directions.

    Whatever is no matrix, and what is excluded, is the merged model's for every input. Coefficients
    of the recipe play no part in what is routed.
    """

    exclude: Exclude = None
    """Regular expression for tensors that are not routed; embeddings and heads by their usual names
    unless given, and nothing where it is empty. Kernels of depthwise convolutions never are."""

    @abstractmethod
    def directions(self, shortest: int, experts: int) -> int:
        """Return how many directions are kept of a matrix whose shorter side is given."""

    def specs(self, plan: Plan) -> list[TensorSpec]:
        """Return the triplets of every matrix, and the changes of its bias.

        Raises:
            RecipeError: there is no matrix.
        """
        found: list[TensorSpec] = []
        count = len(plan.experts)
        for name in self._matrices(plan):
            spec = plan.reference.spec(name)
            (rows, columns), dtype = _folded(spec.shape), spec.dtype
            rank = min(self.directions(min(rows, columns), count), rows, columns)
            found += [
                TensorSpec(f"{name}.left", dtype, (count, rows, rank)),
                TensorSpec(f"{name}.values", torch.float32, (count, rank)),
                TensorSpec(f"{name}.right", dtype, (count, columns, rank)),
            ]
            bias = bias_of(name)
            if bias in merged_tasks(plan):
                found.append(
                    TensorSpec(f"{name}.bias", dtype, (count, *plan.reference.spec(bias).shape))
                )
        if not found:
            raise RecipeError(
                f"{self.component_name()} routes matrices, but the merge has none; set exclude to "
                "a narrower pattern, or leave the companion out."
            )
        return found

    def tensors(self, plan: Plan) -> Iterator[tuple[str, Tensor]]:
        """Yield the triplets; one task matrix and its decomposition are held at a time."""
        specs = {spec.name: spec for spec in self.specs(plan)}
        for name in self._matrices(plan):
            own = {key: specs[f"{name}.{key}"] for key in ("left", "values", "right")}
            made = {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in own.items()}
            rank = made["values"].shape[1]
            for row in range(len(plan.experts) if rank else 0):
                top = linalg.svd(rows_of(_task_vector(plan, row, name)), rank=rank)
                count = len(top.values)
                made["left"][row, :, :count] = top.left.to(made["left"].dtype)
                made["values"][row, :count] = top.values.to(torch.float32)
                made["right"][row, :, :count] = top.right.to(made["right"].dtype)
            for key, tensor in made.items():
                yield f"{name}.{key}", tensor
            if (spec := specs.get(f"{name}.bias")) is not None:
                count = len(plan.experts)
                biases = [_task_vector(plan, row, bias_of(name)) for row in range(count)]
                yield spec.name, torch.stack(biases).to(spec.dtype) * (rank > 0)

    def holds(self, held: Checkpoint, name: str) -> bool:
        """Return whether a tensor is routed, or the bias of one that is."""
        return f"{name}.left" in held or f"{weight_of(name)}.bias" in held

    def restored(
        self, held: Checkpoint, name: str, row: int, *, merged: Tensor, base: Tensor
    ) -> Tensor:
        """Return the base plus the expert's directions, or plus its change of a bias."""
        compute = wider(merged.dtype)
        if f"{name}.left" in held:
            left, values, right = (
                held[f"{name}.{key}"][row].to(compute) for key in ("left", "values", "right")
            )
            moved = ((left * values) @ right.T).view(base.shape)
        else:
            moved = held[f"{weight_of(name)}.bias"][row].to(compute)
        return (base.to(compute) + moved).to(merged.dtype)

    def _matrices(self, plan: Plan) -> Iterator[str]:
        pattern = EXCLUDE if self.exclude is None else self.exclude
        for name, task in merged_tasks(plan).items():
            shape, excluded = task.spec.shape, bool(pattern) and re.search(pattern, name)
            mixes = is_matrix(shape) and (len(shape) == 2 or shape[1] > 1)
            if mixes and plan.reference.spec(name).dtype.is_floating_point and not excluded:
                yield name


def bias_of(weight: str) -> str:
    """Return the name that the bias of a weight has."""
    return f"{weight.removesuffix('weight')}bias" if weight.endswith("weight") else ""


def weight_of(bias: str) -> str:
    """Return the name that the weight of a bias has."""
    return f"{bias.removesuffix('bias')}weight" if bias.endswith("bias") else ""


def _folded(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], torch.Size(shape[1:]).numel()


def _task_vector(plan: Plan, row: int, name: str) -> Tensor:
    base = plan.reference[name]
    return plan.experts[row][name].to(wider(base.dtype)) - base.to(wider(base.dtype))
