"""What methods for low-rank experts share: another method, run in the experts' own directions.

Shapes: K experts, O outputs, I inputs, r directions of one expert.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from mergewell.linalg import Factors, sketched_svd, svd
from mergewell.matrices import InnerMethod, MatrixMerge, TaskMatrices, is_matrix
from mergewell.methods.base import MergeMethod, Needs, needs_by
from mergewell.methods.ties import Ties
from mergewell.tensor_group import TensorGroup

_SKETCHES = (64, 256)
"""Ranks that are tried before a whole matrix is decomposed; adapters have no more."""

_NOTHING = 1e-7
"""Share of a matrix' norm that a sketch may miss: what float64 can tell."""


def _needs_of_inner(method: Any) -> Needs:
    return Needs(base=True, experts=method.of.needs.experts, granularity="matrix")


class LowRankMerge(MatrixMerge):
    """A `MatrixMerge` that runs another method, `of`, on coordinates of the task matrices.

    What is no matrix, and what is excluded, gets `of` itself.
    """

    needs: ClassVar[Needs] = needs_by(_needs_of_inner)

    of: InnerMethod = Ties()
    """The method that merges the coordinates, with its parameters: {name: ties, density: 0.2}."""

    @field_validator("of")
    @classmethod
    def _can_run_on_coordinates(cls, value: MergeMethod) -> MergeMethod:
        name = value.component_name()
        if value.needs.calibration:
            raise ValueError(f"{name} is guided by rows of the tensor, which coordinates have not")
        if any(statistic.scope == "model" for statistic in value.statistics()):
            raise ValueError(f"{name} looks at the whole model, but coordinates are of one matrix")
        return value

    @abstractmethod
    def axes(self, factors: Sequence[Factors]) -> tuple[Tensor, Tensor | None]:
        """Return orthonormal columns [O, m], and [I, n] or None to leave the inputs as they are.

        factors: the singular triplets of each expert's task matrix.
        """

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the task matrix of the merged coordinates."""
        deltas = [expert - matrices.base for expert in matrices.experts]
        factors = [decomposed(d, seed=matrices.drawn(k)) for k, d in enumerate(deltas)]
        left, right = self.axes(factors)
        if not left.shape[1]:
            return torch.zeros_like(matrices.base)
        cores = [left.T @ delta for delta in deltas]
        if right is not None:
            cores = [core @ right for core in cores]
        merged = self.of.merge(
            TensorGroup(
                name=matrices.name,
                experts=tuple(cores),
                coefficients=matrices.coefficients,
                base=torch.zeros_like(cores[0]),
                seed=matrices.seed,
            )
        )
        return left @ (merged if right is None else merged @ right.T)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled task matrix; for vectors what `of` gives, scaled."""
        if is_matrix(group.experts[0].shape):
            return super().merge(group)
        moved = self.of.merge(group) - group.required_base
        return group.required_base + self.scale * moved

    def for_tensor(self, name: str, *, shape: Sequence[int], guided: bool) -> MergeMethod:
        """Return the method with `of` for this tensor, or `of` alone for one that is excluded."""
        inner = self.of.for_tensor(name, shape=shape, guided=guided)
        return inner if self.excludes(name) else self.model_copy(update={"of": inner})

    def objection(self, coefficients: Sequence[float]) -> str:
        """Return what `of` says of the coefficients."""
        return self.of.objection(coefficients)


def decomposed(matrix: Tensor, *, seed: int) -> Factors:
    """Return all singular triplets of a matrix [O, I], quickly where its rank is low.

    A sketch is taken where it misses nothing that can be measured; else the matrix is decomposed.
    """
    for rank in _SKETCHES:
        if 4 * rank <= min(matrix.shape):
            factors = sketched_svd(matrix, rank, seed=seed)
            if factors.missed <= _NOTHING:
                return factors
    return svd(matrix)


def span(columns: Tensor) -> Tensor:
    """Return the left singular vectors of some columns [O, n], orthonormal to rounding."""
    # of a wide matrix the Gram form's left vectors are eigenvectors, of a tall one they are not
    return svd(columns, "full" if columns.shape[0] > columns.shape[1] else "gram").left
