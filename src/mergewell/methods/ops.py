"""What methods share. Sums run over the experts in order, so that results do not depend on blocks.

Shapes: K experts; `task_vectors` are K tensors of one shape.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from mergewell.methods.base import Fraction, MergeMethod, Needs, Probability, needs_by
from mergewell.statistics.depth import LAYER_PATTERN, layer_number
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


def rank_shares(values: Tensor) -> Tensor:
    """Return each value's place among all, 0 the smallest and 1 the largest, ties from the front.

    values and result: [n], the result in float64; a single value is in the middle, at 1/2.
    """
    places = torch.empty(len(values), dtype=torch.float64, device=values.device)
    order = values.sort(stable=True).indices
    places[order] = torch.arange(len(values), dtype=torch.float64, device=values.device)
    return places / (len(values) - 1) if len(values) > 1 else torch.full_like(places, 0.5)


def largest_in_rows(tensor: Tensor, counts: Tensor, *, keep_ties: bool = False) -> Tensor:
    """Return `tensor` with only the `counts` [rows] largest entries of its rows kept.

    Exactly as many, ties from the front, or with `keep_ties` all that equal the last of them.
    """
    rows = rows_of(tensor)
    limit = counts.clamp(0, rows.shape[1])[:, None]
    if not keep_ties or not rows.numel():
        mask = ranks_in_rows(rows) < limit
    else:
        sizes = rows.abs()
        last = sizes.sort(dim=1, descending=True).values.gather(1, (limit - 1).clamp(min=0))
        mask = (sizes >= last) & (limit > 0)
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


Budget = Literal["neutral", "rank", "layer_aware", "random", "reversed", "uniform", "none"]


class GuidedMerge(SparseMerge):
    """A `SparseMerge` that trims rows, those of nodes with a large M-Loss more than others.

    r is a row's place in its tensor by M-Loss, from 0, the smallest, to 1. The density of row i is
    density + spread * (1/2 - r_i), cut to [0, 1], and floor(density_i * length) entries are kept,
    which may be none. Rows that no calibration speaks of stand at r = 1/2.
    """

    needs: ClassVar[Needs] = needs_by(
        lambda method: (
            Needs(base=True)
            if method.budget == "none"
            else Needs(base=True, granularity="row", calibration=("m_loss",))
        )
    )

    density: Fraction = 0.2
    """Fraction of each task vector kept (k in the paper)."""

    spread: Probability = 0.1
    """How far the densities of a tensor's rows lie apart, from the least to the most (e)."""

    budget: Budget = "neutral"
    """How a row's density follows from its place r by M-Loss: density + spread * (1/2 - r), which
    keeps the mean; the paper's density - spread * r ("rank"); neutral about a density that falls
    in the same way with the layer's own place ("layer_aware"). Controls: places drawn at random,
    from the other end, or the same for all rows ("uniform"). "none" trims the tensor as a whole,
    which is what tensors get that are not guided."""

    layer_spread: Probability = 0.1
    """How far the densities of layers lie apart; used by "layer_aware"."""

    layers: tuple[int, ...] | None = None
    """Numbers of the layers that are guided; all unless given."""

    layer_pattern: str = LAYER_PATTERN
    """Regular expression for tensor names; its first group is the layer's number, from 0."""

    ties: Literal["position", "keep"] = "position"
    """Of equal magnitudes in a guided row keep those in front, or all (released code)."""

    def for_tensor(self, name: str, *, shape: Sequence[int], guided: bool) -> Self:
        """Return the method itself for a guided tensor, and that of budget "none" for others."""
        del shape
        if guided and self.layers is not None:
            guided = layer_number(self.layer_pattern, name) in self.layers
        return self if guided else self.model_copy(update={"budget": "none"})

    def row_densities(self, group: TensorGroup) -> Tensor:
        """Return the density of each of the group's rows, [rows], float64, in [0, 1]."""
        rows = rows_of(group.required_base)
        places = group.calibration.get("m_loss_rank")
        if places is None or self.budget == "uniform":
            places = torch.full((rows.shape[0],), 0.5, dtype=torch.float64, device=rows.device)
        if self.budget == "random":
            places = self._drawn(group)
        if self.budget == "reversed":
            places = 1 - places
        density: float | Tensor = self.density
        if self.budget == "layer_aware":
            place = group.calibration.get("m_loss_layer_rank", torch.tensor(0.5))
            density = (self.density + self.layer_spread * (0.5 - place)).clamp(0, 1)
        centre = 0.0 if self.budget == "rank" else 0.5
        return (density + self.spread * (centre - places)).clamp(0, 1)

    def trimmed(self, group: TensorGroup) -> list[Tensor]:
        """Return the task vectors with only the largest entries of each row kept."""
        length = rows_of(group.required_base).shape[1]
        counts = (self.row_densities(group) * length + 1e-9).floor().long()
        keep_ties = self.ties == "keep"
        return [largest_in_rows(tau, counts, keep_ties=keep_ties) for tau in group.task_vectors]

    def _drawn(self, group: TensorGroup) -> Tensor:
        """Return the places of the group's rows in an order drawn by seed and tensor name."""
        rows = rows_of(group.required_base)
        length = max(1, rows.shape[1])
        count = max(rows.shape[0], group.whole_numel // length)
        like = torch.zeros(count, dtype=torch.float64, device=rows.device)
        numbers = replace(group, experts=(like,), base=None, offset=0, numel=-1).uniform(0)
        first = group.offset // length
        return rank_shares(numbers)[first : first + rows.shape[0]]
