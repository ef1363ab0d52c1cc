"""What methods share. Sums run over the experts in order, so that results do not depend on blocks.

Shapes: K experts; `task_vectors` are K tensors of one shape.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergewell.methods.base import MergeMethod, Needs
from mergewell.statistics.magnitude import MagnitudeThreshold, kept_count
from mergewell.statistics.ops import rows_of
from mergewell.tensor_group import TensorGroup, Value

Vote = Literal["mass", "count"]
Divide = Literal["usual", "count", "coefficients", "none"]


def weighted_sum(coefficients: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return sum_k c_k x_k, added up in the order of the experts."""
    total = coefficients[0] * tensors[0]
    for coefficient, tensor in zip(coefficients[1:], tensors[1:], strict=True):
        total = total + coefficient * tensor
    return total


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Return sum_k x_k, added up in the order of the experts."""
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result + tensor
    return result


def largest(group: TensorGroup, expert: int, threshold: MagnitudeThreshold) -> Tensor:
    """Return a mask of an expert's largest task-vector entries, exactly as many as asked for.

    Equal magnitudes at the threshold are kept from the front of the tensor until the number is
    reached (tensors in the order of their names when the threshold is one for the whole model).
    """
    return threshold.mask(group, group.statistic(threshold), expert)


def trim(group: TensorGroup, threshold: MagnitudeThreshold | None) -> list[Tensor]:
    """Return the task vectors with all but their largest entries set to zero; None keeps all."""
    if threshold is None:
        return list(group.task_vectors)
    return [
        torch.where(largest(group, expert, threshold), tau, 0.0)
        for expert, tau in enumerate(group.task_vectors)
    ]


def ranks_in_rows(rows: Tensor) -> Tensor:
    """Return each entry's place in its row by magnitude, 0 the largest, ties from the front.

    rows and result: [rows, length].
    """
    order = rows.abs().sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(rows.shape[1], device=rows.device).expand_as(order).contiguous()
    return torch.zeros_like(order).scatter_(1, order, places)


def trim_rows(tensor: Tensor, density: float) -> Tensor:
    """Return `tensor` with only the largest entries of each row kept; vectors are one row.

    Keeps floor(density * length) entries a row, at least one; ties from the front.
    """
    rows = rows_of(tensor)
    mask = ranks_in_rows(rows) < kept_count(density, rows.shape[1])
    return torch.where(mask, rows, 0.0).reshape(tensor.shape)


def restore_norms(task_vectors: Sequence[Tensor], norms: Value) -> list[Tensor]:
    """Return thinned task vectors times ||whole||_1 / ||kept||_1; nothing kept stays nothing.

    norms: `whole` and `kept`, [K] each.
    """
    whole, kept = norms["whole"], norms["kept"]
    factors = torch.where(kept == 0, 1.0, whole / torch.where(kept == 0, 1.0, kept))
    return [tau * f.to(tau.dtype) for tau, f in zip(task_vectors, factors, strict=True)]


def elect_sign(votes: Sequence[Tensor], vote: Vote) -> Tensor:
    """Return +1 or -1 per entry: the sign with more mass or more experts; a draw is +1."""
    counted = votes if vote == "mass" else [tensor.sign() for tensor in votes]
    summed = total(counted)
    return torch.where(summed >= 0, torch.ones_like(summed), -torch.ones_like(summed))


def divided(summed: Tensor, divisor: Tensor) -> Tensor:
    """Return summed / divisor, and summed itself where the divisor is 0."""
    return torch.where(divisor == 0, summed, summed / torch.where(divisor == 0, 1.0, divisor))


def combine_agreeing(
    group: TensorGroup,
    task_vectors: Sequence[Tensor],
    elected: Tensor,
    divide: Divide,
    *,
    votes: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return the coefficient-weighted sum over entries of the elected sign, divided as asked.

    An expert agrees where its vote has the elected sign; votes are the task vectors themselves
    unless given. Zeros never agree. Where nobody agrees the result is 0.
    """
    summed = torch.zeros_like(elected)
    divisor = torch.zeros_like(elected)
    cast = task_vectors if votes is None else votes
    for coefficient, tau, vote in zip(group.coefficients, task_vectors, cast, strict=True):
        agrees = (vote.sign() == elected).to(tau.dtype)
        summed = summed + coefficient * (tau * agrees)
        divisor = divisor + (coefficient * agrees if divide == "coefficients" else agrees)
    return summed if divide == "none" else divided(summed, divisor)


def add_up(group: TensorGroup, task_vectors: Sequence[Tensor], divide: Divide) -> Tensor:
    """Return sum_k c_k tau_k; divided by K, by sum_k c_k (unless it is below 1e-8), or not."""
    summed = weighted_sum(group.coefficients, task_vectors)
    if divide == "count":
        return summed / len(task_vectors)
    if divide == "coefficients":
        divisor = total(list(group.coefficients))
        return summed / divisor if abs(float(divisor)) >= 1e-8 else summed
    return summed


def zero_sum(coefficients: Sequence[float]) -> str:
    """Return the objection to coefficients that cannot be divided by their sum, or nothing."""
    if abs(sum(coefficients)) < 1e-8:
        return "coefficients sum to 0; change one"
    return ""


def arc_weights(products: Sequence[Tensor], t: float, parallel: float) -> tuple[Tensor, Tensor]:
    """Return the factors of two vectors that give the point at `t` on the arc between them.

    The straight line is taken where |cosine| >= parallel or a vector is 0.
    products: <x, x>, <x, y>, <y, y>, of any one shape, float64; so are the factors.
    """
    first, cross, second = products
    norms = (first * second).sqrt()
    zero = norms == 0
    cosine = torch.where(zero, 1.0, cross / torch.where(zero, 1.0, norms)).clamp(-1, 1)
    straight = zero | (cosine.abs() >= parallel)
    angle = torch.where(straight, 0.0, cosine).arccos()
    left = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    right = torch.where(straight, t, (t * angle).sin() / angle.sin())
    return left, right


def sphere_weights(
    products: Tensor, shares: Tensor, *, iterations: int, tolerance: float
) -> Tensor:
    """Return w such that sum_k w_k x_k has the mean direction of the x_k and their mean length.

    The direction is their Karcher mean on the unit sphere: from the normalised mean of the unit
    vectors, `iterations` steps along the mean of the logarithms, until a step is shorter than
    `tolerance`. All of it happens in the span of the x_k, so inner products suffice and the
    vectors themselves are never held. Zero vectors have no direction. Where the directions
    cancel, and for a single vector, the shares themselves are returned: the straight line.

    products: [K, K], float64; shares: [K]; result: [K], float64.
    """
    shares = shares.to(torch.float64)
    norms = products.diagonal().sqrt()
    moved = norms > 0
    inverse = torch.where(moved, 1 / torch.where(moved, norms, 1.0), 0.0)
    cosines = products * inverse[:, None] * inverse
    alphas = torch.where(moved, shares, 0.0)
    if len(shares) == 1 or float(alphas.sum().abs()) < 1e-8:
        return shares
    alphas = alphas / alphas.sum()

    def length(vector: Tensor) -> Tensor:
        return ((cosines * vector).sum(1) * vector).sum().clamp(min=0).sqrt()

    if float(length(alphas)) < max(tolerance, 1e-8):
        return shares
    mean = alphas / length(alphas)
    for _ in range(iterations):
        dots = (cosines * mean).sum(1).clamp(-1, 1)
        angle = dots.arccos()
        # at the vector itself the factor is 1, at its antipode there is no way to choose
        ends = torch.where(angle < 1, 1.0, 0.0)
        near = angle.sin() < 1e-7
        factor = torch.where(near, ends, angle / torch.where(near, 1.0, angle.sin()))
        pull = alphas * factor * moved
        step = pull - (pull * dots).sum() * mean
        size = length(step)
        if float(size) < tolerance:
            break
        mean = size.cos() * mean + size.sin() * (step / size)
        mean = mean / length(mean)
    return (shares * norms).sum() * mean * inverse


class SparseMerge(MergeMethod):
    """A method that thins every task vector out, then adds up or averages what agrees in sign.

    A subclass says in `thin` what is left of the task vectors. What mergekit calls normalize is
    `divide="coefficients"`, its lambda is `scale`; it elects with `votes="weighted"`.
    """

    needs: ClassVar[Needs] = Needs(base=True)

    combine: Literal["sum", "agreeing"] = "agreeing"
    """Add the task vectors up, or elect a sign for each entry and average those that agree."""

    elect: Vote = "mass"
    """Elect the sign with the larger total magnitude, or with more experts."""

    votes: Literal["plain", "weighted"] = "plain"
    """Vote with the task vectors as they are (papers) or times their coefficients (mergekit)."""

    divide: Divide = "usual"
    """Divide by the number of experts (of those that agree), by the sum of their coefficients, or
    not at all; usual: by the number that agree, and not at all when all are added up."""

    scale: float = 1.0
    """Factor on the merged task vector."""

    @abstractmethod
    def thin(self, group: TensorGroup) -> list[Tensor]:
        """Return the K task vectors with what is to be dropped set to zero, rescaled."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled combination of the thinned task vectors."""
        return group.required_base + self.scale * self.combined(group)

    def combined(self, group: TensorGroup) -> Tensor:
        """Return the thinned task vectors added up, or what agrees of them averaged."""
        thinned = self.thin(group)
        if self.combine == "sum":
            return add_up(group, thinned, self.divide)
        votes = thinned
        if self.votes == "weighted":
            votes = [c * tau for c, tau in zip(group.coefficients, thinned, strict=True)]
        elected = elect_sign(votes, self.elect)
        return combine_agreeing(group, thinned, elected, self.divide, votes=votes)


NEUTRAL_SPARSE = {"density": 1.0, "scale": 1.0, "combine": "agreeing", "divide": "usual"}
"""Parameters of a `SparseMerge` at which one expert, or equal ones, come back."""
