"""What methods share. Sums run over the experts in order, so that results do not depend on blocks.

Shapes: K experts; `task_vectors` are K tensors of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mergewell.statistics.magnitude import MagnitudeThreshold, kept_count, magnitude_key
from mergewell.tensor_group import CHUNK, TensorGroup

Vote = Literal["mass", "count"]
Divide = Literal["count", "coefficients", "none"]


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
    value = group.statistic(threshold)
    key = magnitude_key(group.task_vectors[expert])
    cut = value["key"][expert]
    if "ties_before" not in value:
        return key >= cut
    tied = key == cut
    before = value["ties_before"][expert, group.offset // CHUNK]
    position = tied.flatten().cumsum(0).view(tied.shape) + before
    return (key > cut) | (tied & (position <= value["ties_kept"][expert]))


def trim(group: TensorGroup, threshold: MagnitudeThreshold | None) -> list[Tensor]:
    """Return the task vectors with all but their largest entries set to zero; None keeps all."""
    if threshold is None:
        return list(group.task_vectors)
    return [
        torch.where(largest(group, expert, threshold), tau, 0.0)
        for expert, tau in enumerate(group.task_vectors)
    ]


def trim_rows(tensor: Tensor, density: float) -> Tensor:
    """Return `tensor` with only the largest entries of each row kept; vectors are one row.

    Keeps floor(density * length) entries a row, at least one; ties from the front.
    """
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    kept = kept_count(density, rows.shape[1])
    order = rows.abs().sort(dim=1, descending=True, stable=True).indices[:, :kept]
    mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True)
    return torch.where(mask, rows, 0.0).reshape(tensor.shape)


def elect_sign(votes: Sequence[Tensor], vote: Vote) -> Tensor:
    """Return +1 or -1 per entry: the sign with more mass or more experts; a draw is +1."""
    counted = votes if vote == "mass" else [tensor.sign() for tensor in votes]
    summed = total(counted)
    return torch.where(summed >= 0, torch.ones_like(summed), -torch.ones_like(summed))


def combine_agreeing(
    group: TensorGroup, task_vectors: Sequence[Tensor], elected: Tensor, divide: Divide
) -> Tensor:
    """Return the coefficient-weighted sum over entries of the elected sign, divided as asked.

    Zeros never agree. Where nobody agrees the result is 0.
    """
    summed = torch.zeros_like(elected)
    divisor = torch.zeros_like(elected)
    for coefficient, tau in zip(group.coefficients, task_vectors, strict=True):
        agrees = (tau.sign() == elected).to(tau.dtype)
        summed = summed + coefficient * (tau * agrees)
        divisor = divisor + (agrees if divide == "count" else coefficient * agrees)
    if divide == "none":
        return summed
    return torch.where(divisor == 0, summed, summed / torch.where(divisor == 0, 1.0, divisor))
