"""Gram merges: least squares over what linear maps were given, about an anchor.

One system serves the family: with G_k = X_k X_k^T, the D that minimises
sum_k ||(D - Delta_k) X_k||^2 + mu ||D - A||^2 is (sum_k Delta_k G_k + mu A)(sum_k G_k + mu I)^-1.
It is solved for D - A, so that equal experts, and one, come back bitwise.

Shapes: K experts, G groups of inputs (1 but for grouped convolutions), O outputs and I inputs of a
group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import MergeMethod, Needs, needs_by
from mergewell.tensor_group import TensorGroup

CONDITION = 1e12
"""Condition number up to which a Cholesky factor is trusted, in float64."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a calibration says of a linear map's inputs, each expert's share of it applied."""

    moments: Tensor
    """Second moments c_k G_k / rows_k of each expert's inputs, [K, G, I, I], float64."""

    along: int
    """The weight's dimension that counts inputs."""

    @classmethod
    def of(cls, group: TensorGroup, *, norms: bool = False) -> Inputs | None:
        """Return a group's, coefficients divided by their sum; None where nothing is known.

        With `norms`, the scale of a normalisation is a map too: each number of its own input.
        """
        grams = group.calibration.get("gram")
        if grams is None or (group.experts[0].dim() < 2 and not norms):
            return None
        rows = group.calibration["gram_rows"].clamp(min=1)
        factors = shares(group).to(torch.float64) / rows
        return cls(factors[:, None, None, None] * grams, int(group.calibration["gram_along"]))

    @property
    def size(self) -> float:
        """Mean square of an input over experts and inputs."""
        summed = self.moments.sum(0)
        return float(summed.diagonal(dim1=-2, dim2=-1).mean())

    def shrunk(self, alpha: float) -> Inputs:
        """Return these with their entries off the diagonal times alpha."""
        diagonal = torch.diag_embed(self.moments.diagonal(dim1=-2, dim2=-1))
        return replace(self, moments=alpha * self.moments + (1 - alpha) * diagonal)

    def laid(self, tensor: Tensor) -> Tensor:
        """Return a weight [O, I], [O, I, ...], [I, O] or [G] as [G, O / G, I], float64."""
        turned = tensor if self.along == 1 else tensor.T
        groups, inputs = self.moments.shape[1:3]
        return turned.reshape(groups, -1, inputs).to(torch.float64)

    def back(self, laid: Tensor, like: Tensor) -> Tensor:
        """Return what `laid` made of a tensor in the tensor's shape and dtype."""
        turned = like if self.along == 1 else like.T
        result = laid.reshape(turned.shape).to(like.dtype)
        return result if self.along == 1 else result.T


class GramMerge(MergeMethod):
    """A method that reads the Gram matrices of linear maps' inputs; other tensors are averaged."""

    needs: ClassVar[Needs] = needs_by(
        lambda method: (
            Needs(granularity="matrix", calibration=("gram",)) if method.guided else Needs()
        )
    )

    guided: bool = True
    """Whether the calibration holds the inputs of this tensor's map; planning sets it, to false
    for embeddings, norms and biases, which are averaged."""

    def for_tensor(self, name: str, *, shape: Sequence[int], guided: bool) -> MergeMethod:
        """Return the method itself for a tensor with known inputs, else that which averages."""
        del name, shape
        return self if guided == self.guided else self.model_copy(update={"guided": guided})

    def objection(self, coefficients: Sequence[float]) -> str:
        """Refuse coefficients that are no shares."""
        return not_shares(coefficients)


def not_shares(coefficients: Sequence[float]) -> str:
    """Return the objection to coefficients that cannot weigh inputs, or nothing."""
    if min(coefficients) < 0:
        return "a coefficient is negative, and inputs count by it; make it 0 or more"
    return ops.zero_sum(coefficients)


def shares(group: TensorGroup) -> Tensor:
    """Return the coefficients divided by their sum, [K]."""
    return group.coefficients / group.coefficients.sum()


def averaged(group: TensorGroup) -> Tensor:
    """Return the experts' average, bitwise the expert where they are equal."""
    first, *others = group.experts
    for share, expert in zip(shares(group)[1:], others, strict=True):
        first = first + share * (expert - group.experts[0])
    return first


def anchored(
    group: TensorGroup,
    anchor: Tensor,
    inputs: Inputs,
    *,
    ridge: float = 0.0,
    cutoff: float = 1 / CONDITION,
    steps: int | None = None,
) -> Tensor:
    """Return the weight that does on each expert's inputs what the expert does, near an anchor.

    It minimises sum_k tr((W - W_k) M_k (W - W_k)^T) + ridge ||W - anchor||^2 for the second moments
    M_k. Without a ridge it is the minimum nearest to the anchor, which stays as it is in
    directions that no input has; see `divided` for `cutoff`. With `steps` it is looked for by so
    many steps of conjugate gradients from the anchor.
    """
    right: Tensor | float = 0.0
    for expert, moment in zip(group.experts, inputs.moments, strict=True):
        right = right + inputs.laid(expert - anchor) @ moment
    assert isinstance(right, Tensor)
    whole = inputs.moments.sum(0)
    whole.diagonal(dim1=-2, dim2=-1).add_(ridge)
    if steps is not None:
        return anchor + inputs.back(conjugate_gradients(right, whole, steps=steps), anchor)
    return anchor + inputs.back(divided(right, whole, cutoff=cutoff), anchor)


def divided(right: Tensor, whole: Tensor, *, cutoff: float = 1 / CONDITION) -> Tensor:
    """Return right times the inverse of a positive semi-definite matrix, in float64.

    By Cholesky after scaling to a diagonal of ones. Where that fails, or the factor's diagonal
    shows a condition number above `CONDITION`, and wherever `cutoff` is more than 1 / `CONDITION`,
    by eigenvalues, in three to four times the time: directions below `cutoff` of the largest give 0
    (pseudo-inverse). Inputs that are always 0 give 0.

    right: [G, O, I]; whole: [G, I, I]; result: [G, O, I].
    """
    diagonal = whole.diagonal(dim1=-2, dim2=-1)
    seen = diagonal > 0
    scale = torch.where(seen, diagonal.clamp(min=1e-300).rsqrt(), 0.0)
    scaled = whole * scale[..., :, None] * scale[..., None, :]
    scaled.diagonal(dim1=-2, dim2=-1).add_((~seen).to(scaled.dtype))
    factor, failed = cast("tuple[Tensor, Tensor]", cast("Any", torch.linalg).cholesky_ex(scaled))
    ends = factor.diagonal(dim1=-2, dim2=-1)
    worst = (ends.amax(-1) / ends.amin(-1).clamp(min=1e-300)).square()
    bad = (failed != 0) | ~(worst <= CONDITION) | (cutoff > 1 / CONDITION)
    factor = torch.where(bad[:, None, None], torch.eye(len(scaled[0])).to(factor), factor)
    scaled_right = (right * scale[..., None, :]).mT
    result = torch.cholesky_solve(scaled_right, factor).mT * scale[..., None, :]
    for group in cast("list[int]", bad.nonzero().flatten().tolist()):
        result[group] = _pseudo_divided(right[group], whole[group], cutoff)
    return result


def _pseudo_divided(right: Tensor, whole: Tensor, cutoff: float) -> Tensor:
    values, vectors = cast("tuple[Tensor, Tensor]", cast("Any", torch.linalg).eigh(whole))
    kept = values > cutoff * values[-1].clamp(min=0)
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return ((right @ vectors) * inverse) @ vectors.mT


def conjugate_gradients(
    right: Tensor, whole: Tensor, *, steps: int, tolerance: float = 1e-12
) -> Tensor:
    """Return nearly right times the inverse of a positive semi-definite matrix, in float64.

    From 0, at most `steps` steps for each row on its own, which ends as its residual is below
    `tolerance` of what it began with. Steps from 0 stay in the matrix's range, so nothing is given
    in directions that no input has.

    right: [G, O, I]; whole: [G, I, I]; result: [G, O, I].
    """
    result = torch.zeros_like(right)
    residual = direction = right
    size = residual.square().sum(-1, keepdim=True)
    enough = size * tolerance**2
    for _ in range(steps):
        going = size > enough
        if not bool(going.any()):
            break
        mapped = direction @ whole
        bend = (direction * mapped).sum(-1, keepdim=True)
        going = going & (bend > 0)
        step = torch.where(going, size / torch.where(going, bend, 1.0), 0.0)
        result = result + step * direction
        residual = residual - step * mapped
        renewed = residual.square().sum(-1, keepdim=True)
        turn = torch.where(going, renewed / torch.where(going, size, 1.0), 0.0)
        direction = residual + turn * direction
        size = torch.where(going, renewed, torch.zeros_like(size))
    return result
