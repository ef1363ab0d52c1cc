"""Decompositions of one weight matrix: singular triplets and the orthogonal polar factor.

By the Gram matrix of the shorter side in float64, which is faster than a full SVD even of a square
matrix and needs no more than that side squared; by LAPACK's SVD; or by a seeded random sketch whose
error is measured. Directions shorter than `NOISE` times the longest are left out: fine-tunes do not
have them, and the Gram matrix, whose condition is the matrix' squared, cannot tell them.

Shapes: O outputs, I inputs, q singular directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

NOISE = 1e-6
"""Singular values below this share of the largest count as 0.

By the Gram matrix a value is right to 1e-8 of the largest at worst, and the singular vectors of
one at the limit are orthonormal to about 1e-4.
"""

Decomposition = Literal["gram", "full"]
"""By the Gram matrix in float64, or LAPACK's SVD in the matrix' own dtype."""

_CHUNK = 1 << 21  # elements that are widened to float64 at a time

OVERSAMPLING = 16
"""Directions of a sketch beyond those that are asked for."""

POWER_STEPS = 2
"""How often a sketch is multiplied by the matrix and its transpose."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Singular triplets of one matrix, longest first; none of a zero matrix."""

    left: Tensor
    """Left singular vectors, [O, q]."""

    values: Tensor
    """Singular values, [q]."""

    right: Tensor
    """Right singular vectors, [I, q]."""

    norm: float
    """Frobenius norm of the whole matrix."""

    @property
    def missed(self) -> float:
        """Share of the whole matrix' norm that lies outside of these directions."""
        if self.norm == 0:
            return 0.0
        held = float(self.values.to(torch.float64).square().sum()) / self.norm**2
        return max(0.0, 1 - held) ** 0.5

    def top(self, rank: int) -> Factors:
        """Return the `rank` longest triplets, or all there are."""
        return Factors(
            self.left[:, :rank], self.values[:rank], self.right[:, :rank], self.norm
        )  # fmt: skip

    def matrix(self, values: Tensor | None = None) -> Tensor:
        """Return U S V' [O, I], with other singular values where they are given."""
        return (self.left * (self.values if values is None else values)) @ self.right.T


def svd(matrix: Tensor, how: Decomposition = "gram", *, rank: int | None = None) -> Factors:
    """Return the singular triplets of a matrix [O, I], in its dtype: all, or the `rank` longest.

    With a rank the other vectors are neither made nor, in the end, held.
    """
    norm = frobenius(matrix)
    if norm == 0:
        none = matrix.new_zeros(0)
        return Factors(matrix[:, :0], none, matrix.T[:, :0], 0.0)
    if how == "full":
        left, values, right = cast(
            "tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(matrix, full_matrices=False)
        )
        kept = values[:rank][values[:rank] > NOISE * values[0]].clone()
        count = len(kept)
        return Factors(left[:, :count].clone(), kept, right[:count].clone().T, norm)
    tall = matrix.shape[0] > matrix.shape[1]
    squares, vectors = eigh(gram(matrix if tall else matrix.T))
    lengths = squares.clamp(min=0).sqrt()
    count = int((lengths[:rank] > NOISE * lengths[0]).sum())
    values = lengths[:count].to(matrix.dtype)
    known = vectors[:, :count].clone().to(matrix.dtype)
    other = (matrix @ known if tall else matrix.T @ known).div_(values)
    left, right = (other, known) if tall else (known, other)
    return Factors(left, values, right, norm)


def sketched_svd(matrix: Tensor, rank: int, *, seed: int) -> Factors:
    """Return about the `rank` longest triplets, from a random sketch of the columns' span.

    `missed` says how much of the norm is left out, which no choice of `rank` directions can bring
    below the tail of the exact values. As many rows or columns as the sketch is wide: exact.

    Source: Halko et al. 2011, arXiv:0909.4061, algorithm 4.4 (two power steps, 16 more directions).
    """
    width = rank + OVERSAMPLING
    if width >= min(matrix.shape):
        return svd(matrix, rank=rank)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(
        matrix.shape[1], width, generator=generator, dtype=torch.float32, device="cpu"
    )  # fmt: skip
    basis = _orthonormal(matrix @ drawn.to(matrix))
    for _ in range(POWER_STEPS):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    small = svd(basis.T @ matrix, rank=rank)
    return Factors(basis @ small.left, small.values, small.right, frobenius(matrix))


def polar(matrix: Tensor, how: Decomposition = "gram") -> Tensor:
    """Return P of A = P H: the nearest matrix [O, I] with orthonormal columns (or rows).

    Where A is short of rank it is a partial isometry: directions that A lacks are not made up.
    """
    factors = svd(matrix, how)
    return factors.left @ factors.right.T


def newton_schulz_polar(matrix: Tensor, *, steps: int = 40) -> Tensor:
    """Return the polar factor by products alone: X <- X (3 - X'X) / 2 from A / ||A||.

    A direction of length s (against ||A||, the Frobenius norm) ends at 1 to the dtype's precision
    if s > 1.5^(7 - steps), and below 1 if it is shorter: 2e-6 for the default. It stops early where
    nothing changes.

    Source: Higham 2008, "Functions of Matrices", section 8.3.
    """
    norm = frobenius(matrix)
    if norm == 0:
        return torch.zeros_like(matrix)
    tall = matrix.shape[0] >= matrix.shape[1]
    x = (matrix if tall else matrix.T) / norm
    limit = 4 * torch.finfo(x.dtype).eps * min(matrix.shape) ** 0.5
    for _ in range(steps):
        step = 0.5 * (x - x @ (x.T @ x))
        x = x + step
        if frobenius(step) <= limit:
            break
    return x if tall else x.T


def log_rotations(rotations: Tensor) -> Tensor:
    """Return the real, skew logarithms of rotations [n, h, h], by angles in (-pi, pi]."""
    values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eig(rotations))
    inverse = cast("Tensor", torch.linalg.inv(vectors))
    log = ((vectors * (1j * values.angle()[:, None])) @ inverse).real
    return (log - log.mT) / 2


def gram(matrix: Tensor) -> Tensor:
    """Return A'A [I, I] in float64, added up over slices of the rows in their order."""
    rows = max(1, _CHUNK // max(1, matrix.shape[1]))
    total = torch.zeros(
        matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device
    )  # fmt: skip
    for start in range(0, matrix.shape[0], rows):
        wide = matrix[start : start + rows].to(torch.float64)
        total = total.addmm(wide.T, wide)
    return total


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first, and eigenvectors in columns of a symmetric matrix."""
    values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(symmetric))
    return values.flip(0), vectors.flip(1)


def frobenius(matrix: Tensor) -> float:
    """Return the root of the sum of squares, summed in float64."""
    return float(cast("Tensor", torch.linalg.vector_norm(matrix, dtype=torch.float64)))


def _orthonormal(matrix: Tensor) -> Tensor:
    return cast("Tensor", torch.linalg.qr(matrix).Q)
