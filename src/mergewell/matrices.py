"""What methods on whole weight matrices share: which tensors are matrices, and how they are seen.

A `MatrixMerge` sees K task matrices [O, I], whatever the tensor looks like: kernels of convolutions
are folded to O x (I kh kw), several matrices in one tensor are taken apart, transposed storage is
turned. Vectors, embeddings and heads are no matrices in its sense and get an ordinary method.

Shapes: K experts, O outputs, I inputs.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar, Literal, cast, overload

import torch
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer
from torch import Tensor

from mergewell import linalg
from mergewell.errors import RecipeError
from mergewell.methods import ops
from mergewell.methods.base import METHODS, MergeMethod, Needs, needs_by
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.statistics.base import WeightStatistic
from mergewell.statistics.ops import rows_of
from mergewell.tensor_group import TensorGroup, random_key

EXCLUDE = (
    r"(?:^|\.)(?:embed|embeddings?|embed_\w+|\w+_embed|\w+_embeddings?|wte|wpe|text_projection"
    r"|visual_projection|relative_attention_bias|heads?|lm_head|classification_head|classifier"
    r"|score|qa_outputs)(?:\.|$)|^shared\.weight$|^fc\.|^cls\."
)
"""Finds embeddings, projections between modalities, and heads by the names of common models."""


def _is_a_pattern(value: str | None) -> str | None:
    try:
        re.compile(value or "")
    except re.error as error:
        raise ValueError(f"exclude is no regular expression: {error}") from error
    return value


Exclude = Annotated[str | None, AfterValidator(_is_a_pattern)]
"""The type of a field `exclude`: what is treated as no matrix, by name."""


@dataclass(frozen=True)
class TaskMatrices(Sequence[Tensor]):
    """K task matrices c_k (theta_k - theta_0) [O, I], each made when it is asked for.

    So a method that goes through them one by one holds one at a time.
    """

    name: str
    """The tensor's name, for messages and random numbers."""

    base: Tensor
    """The base's matrix, [O, I]."""

    experts: tuple[Tensor, ...]
    """The experts' matrices, [O, I] each."""

    coefficients: Tensor
    """Coefficients of the experts, [K]."""

    seed: int = 0

    def __len__(self) -> int:
        """Return K."""
        return len(self.experts)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """Return one task matrix times its coefficient."""
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        return self.coefficients[index] * (self.experts[index] - self.base)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return cast("tuple[int, int]", tuple(self.base.shape))

    @property
    def rank(self) -> int:
        """The shorter side."""
        return min(self.shape)

    def total(self) -> Tensor:
        """Return the sum, added up in the order of the experts."""
        summed = self[0]
        for k in range(1, len(self)):
            summed = summed + self[k]
        return summed

    def drawn(self, expert: int) -> int:
        """Return the seed of one expert's random numbers."""
        return random_key(self.seed, self.name, expert)


class MatrixMerge(MergeMethod):
    """A method that makes one task matrix of K, and leaves what is no matrix to another method."""

    needs: ClassVar[Needs] = Needs(base=True, granularity="matrix")

    scale: float = 1.0
    """Factor on the merged task vector, of matrices and all else."""

    exclude: Exclude = None
    """Regular expression for tensors that are not treated as matrices; embeddings and heads by
    their usual names unless given, and nothing where it is empty. The plan says what they get."""

    parts: Annotated[int, Field(ge=1)] = 1
    """Matrices of one size that a tensor holds, one below the other: 3 for fused queries, keys and
    values. Set it by a rule for these tensors."""

    transposed: bool = False
    """The tensor is stored as inputs by outputs (GPT-2's Conv1D). Set it by a rule."""

    @abstractmethod
    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the merged task matrix [O, I], before `scale`."""

    def others(self) -> MergeMethod:
        """Return the method for what is no matrix: the average of the task vectors times scale."""
        return TaskArithmetic(scale=self.scale, divide="count")

    def for_tensor(self, name: str, *, shape: Sequence[int], guided: bool) -> MergeMethod:
        """Return the method itself, or that of `others` for what is no matrix or excluded."""
        del guided
        return self if is_matrix(shape) and not self.excludes(name) else self.others()

    def excludes(self, name: str) -> bool:
        """Return whether a tensor is no matrix by its name."""
        pattern = EXCLUDE if self.exclude is None else self.exclude
        return bool(pattern) and re.search(pattern, name) is not None

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled merged task matrix; for vectors that of `others`."""
        if not is_matrix(group.experts[0].shape):
            return self.others().merge(group)
        return group.required_base + self.scale * self.on_matrices(group, self.combine)

    def on_matrices(self, group: TensorGroup, of: Callable[[TaskMatrices], Tensor]) -> Tensor:
        """Return what `of` makes of each matrix in a tensor, put together in the tensor's shape."""
        base = self.folded(group.required_base, group.name)
        experts = [self.folded(expert, group.name) for expert in group.experts]
        made = [
            of(
                TaskMatrices(
                    name=f"{group.name}:{part}" if part else group.name,
                    base=base[part],
                    experts=tuple(expert[part] for expert in experts),
                    coefficients=group.coefficients,
                    seed=group.seed,
                )
            )
            for part in range(self.parts)
        ]
        return self.unfolded(made, group.required_base)

    def folded(self, tensor: Tensor, name: str) -> list[Tensor]:
        """Return the matrices [O, I] in a tensor.

        Raises:
            RecipeError: it does not consist of `parts` equal ones.
        """
        rows = rows_of(tensor)
        matrix = rows.T if self.transposed else rows
        if matrix.shape[0] % self.parts:
            raise RecipeError(
                f"{self.component_name()}: {name} has {matrix.shape[0]} outputs, which are not "
                f"parts = {self.parts} equal matrices; set parts by a rule for fused tensors only."
            )
        return list(matrix.chunk(self.parts))

    def unfolded(self, matrices: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return the tensor of the shape of `like` that these matrices fold out to."""
        matrix = matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))
        rows = matrix.T if self.transposed else matrix
        return rows.reshape(like.shape)


def trimmed(matrix: Tensor, density: float) -> Tensor:
    """Return a matrix with only its largest entries kept, ties from the front."""
    return ops.trim_rows(matrix.flatten(), density).view(matrix.shape)


def mean_of_agreeing(matrices: Sequence[Tensor]) -> Tensor:
    """Return the mean, entry by entry, over the matrices that have the elected sign (TIES)."""
    elected = ops.elect_sign(matrices, "mass")
    agree = [(matrix.sign() == elected).to(matrix.dtype) for matrix in matrices]
    summed = ops.total([m * agrees for m, agrees in zip(matrices, agree, strict=True)])
    return ops.divided(summed, ops.total(agree))


def is_matrix(shape: Sequence[int]) -> bool:
    """Return whether a tensor of this shape, folded, has two rows and two columns at least."""
    return len(shape) > 1 and shape[0] > 1 and prod(shape[1:]) > 1


class SpectralMerge(MatrixMerge):
    """A `MatrixMerge` that decomposes its matrices."""

    svd: Literal["gram", "full"] = "gram"
    """Decompose by the Gram matrix of the shorter side in float64 (fast; singular values to 1e-8 of
    the largest), or by LAPACK's SVD in the compute dtype. Directions below 1e-6 are left out."""

    def factors(self, matrix: Tensor, rank: int | None = None) -> linalg.Factors:
        """Return the singular triplets of a matrix: all, or the `rank` longest."""
        return linalg.svd(matrix, self.svd, rank=rank)

    def polar(self, matrix: Tensor) -> Tensor:
        """Return the polar factor of a matrix."""
        return linalg.polar(matrix, self.svd)


class TruncatedMerge(SpectralMerge):
    """A `SpectralMerge` that needs a known number of each expert's leading directions only."""

    svd: Literal["gram", "full", "random"] = "gram"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Decompose by the Gram matrix of the shorter side in float64 (fast; singular values to 1e-8 of
    the largest), by LAPACK's SVD in the compute dtype, or each expert by a seeded random sketch of
    the directions that are kept (fastest for few of a large matrix; leading ones to about 1e-3)."""

    def factors(self, matrix: Tensor, rank: int | None = None) -> linalg.Factors:
        """Return the singular triplets of a matrix, exactly: all, or the `rank` longest."""
        return linalg.svd(matrix, "full" if self.svd == "full" else "gram", rank=rank)

    def polar(self, matrix: Tensor) -> Tensor:
        """Return the polar factor of a matrix, exactly."""
        return linalg.polar(matrix, "full" if self.svd == "full" else "gram")

    def leading(self, matrices: TaskMatrices, expert: int, rank: int) -> linalg.Factors:
        """Return the `rank` longest triplets of one expert's task matrix, or all there are."""
        if self.svd == "random":
            return linalg.sketched_svd(matrices[expert], rank, seed=matrices.drawn(expert))
        return self.factors(matrices[expert], rank)


def _built(value: Any) -> Any:
    if isinstance(value, str):
        return METHODS.build(value, {})
    if isinstance(value, Mapping):
        data = dict(cast("Mapping[str, Any]", value))
        if "name" not in data:
            raise ValueError("an inner method needs a name, such as {name: ties, density: 0.2}")
        return METHODS.build(str(data.pop("name")), data)
    return value


def _as_data(method: MergeMethod) -> dict[str, Any]:
    return {"name": method.component_name(), **method.parameters()}


InnerMethod = Annotated[
    MergeMethod, BeforeValidator(_built), PlainSerializer(_as_data, return_type=dict[str, Any])
]
"""A method as another's parameter: its name, or a mapping of name and parameters."""


def sums_up(scale: float) -> MergeMethod:
    """Return task arithmetic at this scale, which inner methods are unless given."""
    return TaskArithmetic(scale=scale)


def alone(method: MergeMethod, matrices: TaskMatrices) -> Tensor:
    """Return what a method makes of these matrices as if they were a tensor of their own."""
    return method.merge(
        TensorGroup(
            matrices.name, matrices.experts, matrices.coefficients, matrices.base, matrices.seed
        )
    )


def cannot_run_alone(method: MergeMethod) -> str:
    """Return the objection to an inner method that has to know more than one matrix, or nothing."""
    whole_model = any(statistic.scope == "model" for statistic in method.statistics())
    if whole_model or method.needs.calibration:
        return (
            f"of: {method.component_name()} asks for more than the one matrix it gets here; give "
            "it a scope of one tensor, or choose another"
        )
    return ""


def _needs_of_inner(method: Any) -> Needs:
    inner = method.of.needs
    return Needs(
        base=True, experts=inner.experts, granularity="matrix", calibration=inner.calibration
    )


class RefinedMerge(SpectralMerge):
    """A `SpectralMerge` that corrects the task matrix which another method, `of`, has merged."""

    needs: ClassVar[Needs] = needs_by(_needs_of_inner)

    of: InnerMethod = TaskArithmetic()
    """The method whose result is corrected, with its parameters: {name: ties, density: 0.2}."""

    @abstractmethod
    def refine(self, merged: Tensor, matrices: TaskMatrices) -> Tensor:
        """Return the corrected task matrix [O, I], before `scale`."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the corrected result of `of`, run on this matrix as if it were a tensor."""
        return self.refine(alone(self.of, matrices) - matrices.base, matrices)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled corrected task vector."""
        merged = self.of.merge(group) - group.required_base
        if not is_matrix(merged.shape):
            return group.required_base + self.scale * self.refine_vector(merged, group)
        whole = iter(self.folded(merged, group.name))

        def refine(matrices: TaskMatrices) -> Tensor:
            return self.refine(next(whole), matrices)

        refined = self.on_matrices(group, refine)
        return group.required_base + self.scale * refined

    def refine_vector(self, merged: Tensor, group: TensorGroup) -> Tensor:
        """Return the corrected task vector of what is no matrix; as it is unless overridden."""
        del group
        return merged

    def for_tensor(self, name: str, *, shape: Sequence[int], guided: bool) -> MergeMethod:
        """Return the method with `of` for this tensor, or `of` alone for one that is excluded."""
        inner = self.of.for_tensor(name, shape=shape, guided=guided)
        return inner if self.excludes(name) else self.model_copy(update={"of": inner})

    def statistics(self) -> Sequence[WeightStatistic]:
        """Return the statistics that `of` needs."""
        return self.of.statistics()

    def objection(self, coefficients: Sequence[float]) -> str:
        """Return what `of` says of the coefficients."""
        return self.of.objection(coefficients)
