"""Task vector sums: everything that a check adds up over the weights, from one reading of them.

Inner products, cancelled and opposed mass, and plain sums are products of one small matrix with
itself, so they are made together, by matrix products on what lies in the cache.

Shapes: K experts; M = K + 1 vectors, the base and the task vectors; n elements of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_CHUNK = 1 << 15
"""Elements of every vector that are looked at together, to stay in the cache."""

_WIDTH = 1 << 11
"""Elements over which products are added up in float32; their sums are added up in float64."""

_FAINT = 1e-20
"""Squared norm of a chunk below which float32 may lose what is there."""


@dataclass(frozen=True, slots=True)
class TaskVectorSums:
    """Sums over the elements of one tensor or of a part of it; parts are added up with `+`."""

    products: Tensor
    """Inner products of the base and the task vectors, [M, M], float64."""

    mass: Tensor
    """sum |sum_k tau_k|, which is what remains when they are added, and sum sum_k |tau_k|, [2]."""

    pairs: Tensor
    """Of each pair sum |tau_i| |tau_j|, over the entries of opposite sign and over all, [2, K, K].

    Source: the elected-sign disagreement of TIES (arXiv:2306.01708, section 3), weighted by mass.
    Departures: weighted by magnitude, so that the many tiny entries do not drown the large ones.
    """

    sums: Tensor
    """Sum of each task vector's entries, [K], float64."""

    @classmethod
    def zero(cls, experts: int) -> Self:
        """Return the sums over no elements."""
        shapes = ((experts + 1, experts + 1), (2,), (2, experts, experts), (experts,))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    @classmethod
    def of(cls, base: Tensor, experts: Sequence[Tensor]) -> Self:
        """Return the sums of one block, [n] of the base and of each expert, as they are stored.

        Task vectors are taken and multiplied in float32 (float64 if a model is stored so), added
        up in float64. Opposed mass is half of what the products of magnitudes are above those with
        signs, exactly 0 where nothing opposes. An expert that is the very memory of the base did
        not move and costs nothing. What is too large or too faint for float32 is done in float64.
        """
        total = cls.zero(len(experts))
        moved = [k for k, expert in enumerate(experts) if not _is_same(expert, base)]
        wide = any(tensor.dtype == torch.float64 for tensor in (base, *experts))
        dtype = torch.float64 if wide else torch.float32
        for start in range(0, base.numel(), _CHUNK):
            cut = slice(start, start + _CHUNK)
            read = [base[cut], *(experts[k][cut] for k in moved)]
            vectors = _vectors(read, dtype)
            products = _products(vectors)
            if dtype == torch.float32 and not _is_trusted(vectors, products):
                vectors = _vectors(read, torch.float64)
                products = _products(vectors)
            total._add(moved, vectors, products)
        return total

    def __add__(self, other: TaskVectorSums) -> TaskVectorSums:
        """Return the sums over the elements of both."""
        return TaskVectorSums(
            self.products + other.products,
            self.mass + other.mass,
            self.pairs + other.pairs,
            self.sums + other.sums,
        )

    def _add(self, moved: Sequence[int], vectors: Tensor, products: Tensor) -> None:
        """Add a chunk, in place: the base and the task vectors that moved."""
        rows = torch.tensor([0, *(k + 1 for k in moved)])
        self.products[rows[:, None], rows] += products
        if not moved:
            return
        taus, places = vectors[1:], rows[1:] - 1
        sizes = taus.abs()
        whole, signed = _products(sizes), products[1:, 1:]
        self.mass[0] += taus.sum(0).abs().sum()
        self.mass[1] += sizes.sum()
        self.pairs[0, places[:, None], places] += (whole - signed).clamp(min=0) / 2
        self.pairs[1, places[:, None], places] += whole
        self.sums[places] += taus.sum(1).to(torch.float64)


def _vectors(read: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the base and the task vectors in the dtype, one under the other."""
    base = read[0].to(dtype)
    vectors = torch.empty(len(read), len(base), dtype=dtype)
    vectors[0] = base
    for row, expert in zip(vectors[1:], read[1:], strict=True):
        torch.sub(expert.to(dtype), base, out=row)
    return vectors


def _products(vectors: Tensor) -> Tensor:
    """Return the inner products of all rows, float64, added up in float64 over parts."""
    whole = vectors.shape[1] // _WIDTH * _WIDTH
    parts = vectors[:, :whole].view(len(vectors), -1, _WIDTH).transpose(0, 1)
    rest = vectors[:, whole:]
    sums = torch.bmm(parts, parts.mT).sum(0, dtype=torch.float64)
    return sums + (rest @ rest.T).to(torch.float64)


def _is_trusted(vectors: Tensor, products: Tensor) -> bool:
    """Return whether products in float32 neither overflowed nor vanished."""
    if not bool(products.isfinite().all()):
        return False
    faint = products.diagonal() < _FAINT
    return not bool(faint.any()) or not bool(vectors[faint].any())


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.dtype == other.dtype
