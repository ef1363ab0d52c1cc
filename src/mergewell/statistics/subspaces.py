"""Subspaces of task matrices: how the experts' singular directions lie to one another.

Plain functions on whole matrices. Up to `EXACT` on the shorter side a decomposition is exact (by
the Gram matrix in float64, methods.md section 2); above it is a seeded randomised one of `RANK`
directions, whose error (the share of the norm that it misses) is measured and stated.

Shapes: K experts, O outputs, I inputs, q singular directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergewell import linalg

EXACT = 1024
"""Shorter side up to which a matrix is decomposed exactly."""

RANK = 256
"""Directions of a randomised decomposition."""

RESIDUAL = 0.05
"""Share of a matrix' norm that its subspace may miss (arXiv:2502.04959, section 3)."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Leading singular triplets of one matrix, largest first; none of a zero matrix."""

    left: Tensor
    """Left singular vectors, [O, q]."""

    values: Tensor
    """Singular values, [q], float64."""

    right: Tensor
    """Right singular vectors, [I, q]."""

    norm: float
    """Frobenius norm of the whole matrix."""

    def missed(self, rank: int) -> float:
        """Return the share of the norm outside of the first `rank` directions."""
        if self.norm == 0:
            return 0.0
        held = float(self.values[:rank].square().sum()) / self.norm**2
        return max(0.0, 1 - held) ** 0.5

    def rank(self, residual: float = RESIDUAL) -> int:
        """Return the fewest directions that miss `residual` at most, or all there are."""
        held = self.values.square().cumsum(0)
        enough = (1 - residual**2) * self.norm**2
        return min(len(held), int((held < enough * (1 - 1e-12)).sum()) + 1)


def decompose(matrix: Tensor, *, seed: int, exact: int = EXACT, rank: int = RANK) -> Factors:
    """Return the singular triplets of a matrix [O, I]: all, or the `rank` leading ones.

    See `linalg.svd` and, of the randomised form, `linalg.sketched_svd`.
    """
    whole = min(matrix.shape) <= exact
    found = linalg.svd(matrix) if whole else linalg.sketched_svd(matrix, rank, seed=seed)
    return Factors(found.left, found.values.to(torch.float64), found.right, found.norm)


def alignment(matrix: Tensor, subspace: Tensor, *, norm: float) -> float:
    """Return ||U U' A|| / ||A|| for orthonormal columns U [O, k] and A [O, I]; nan for a zero A.

    `norm` is ||A||. Instead of A may be given what has the same A A'.
    """
    if norm == 0:
        return float("nan")
    return min(1.0, linalg.frobenius(subspace.T @ matrix) / norm)


@dataclass(frozen=True, slots=True)
class Interference:
    """Singular task interference of one matrix."""

    value: float
    """||(U'U - 1) S (V'V - 1)||_1 over all entries, in units of the weights."""

    unrelated: float
    """What it would be for directions drawn at random with the same singular values."""


def interference(factors: Sequence[Factors], rank: int) -> Interference:
    """Return the interference of the experts' `rank` leading directions.

    U, V hold the experts' singular vectors side by side, S their values. In the mean over random
    directions the entry (a, b) is a sum of products of two cosines of variance 1/O and 1/I over the
    directions of the experts that neither a nor b belongs to, hence nearly Gaussian.

    Source: arXiv:2412.00081, section 3.3. The random reference is ours.
    """
    left = torch.cat([f.left[:, :rank] for f in factors], dim=1).to(torch.float64)
    right = torch.cat([f.right[:, :rank] for f in factors], dim=1).to(torch.float64)
    values = torch.cat([f.values[:rank] for f in factors])
    between = left.T @ left - torch.eye(len(values), dtype=torch.float64)
    across = right.T @ right - torch.eye(len(values), dtype=torch.float64)
    value = float(((between * values) @ across).abs().sum())
    counts = torch.tensor([len(f.values[:rank]) for f in factors], dtype=torch.float64)
    energies = torch.stack([f.values[:rank].square().sum() for f in factors])
    own = torch.eye(len(factors), dtype=torch.float64)
    others = energies.sum() - energies[:, None] - energies + own * energies
    spread = (others.clamp(min=0) * 2 / torch.pi / left.shape[0] / right.shape[0]).sqrt()
    return Interference(value, float((counts[:, None] * counts * spread).sum()))


@dataclass(frozen=True, slots=True)
class MatrixSubspaces:
    """How the task matrices of one tensor lie to their sum and to one another."""

    alignment: Tensor
    """Share of each expert's norm in the sum's subspace, [K]; nan where it did not move."""

    pairs: Tensor
    """Share of expert i's norm in the subspace of expert j, [K, K]; nan where one did not move."""

    rank: int
    """Directions of the sum's subspace."""

    missed: float
    """Share of the sum's norm outside of its subspace; above `RESIDUAL` alignments are bounds."""

    interference: Interference

    directions: int
    """Directions of each expert that interference was measured of."""

    shape: tuple[int, int]
    """Of the matrices, (O, I)."""


def measure_subspaces(
    task_matrices: Sequence[Tensor], coefficients: Sequence[float], *, seed: int = 0
) -> MatrixSubspaces:
    """Return alignment and interference of K task matrices [O, I] of one tensor."""
    # float32 tells changes of weights; what it cannot, small eigenvalues, is float64 in `linalg`
    matrices = [matrix.to(torch.float32) for matrix in task_matrices]
    summed = torch.zeros_like(matrices[0])
    for coefficient, matrix in zip(coefficients, matrices, strict=True):
        summed = summed + coefficient * matrix
    factors = [decompose(m, seed=seed) for m in matrices]
    merged = decompose(summed, seed=seed)
    bases = [f.left[:, : f.rank()] for f in factors]
    rank = merged.rank()
    narrow = [_as_short(f, m) for f, m in zip(factors, matrices, strict=True)]
    norms = [f.norm for f in factors]
    span = merged.left[:, :rank]
    inside = [alignment(m, span, norm=n) for m, n in zip(narrow, norms, strict=True)]
    pairs = [
        [
            float("nan")
            if not bases[j].shape[1]
            else (1 - factors[j].missed(bases[j].shape[1]) ** 2) ** 0.5
            if i == j
            else alignment(m, bases[j], norm=norms[i])
            for j in range(len(narrow))
        ]
        for i, m in enumerate(narrow)
    ]
    share = max(1, min(task_matrices[0].shape) // len(task_matrices))
    directions = min(share, max(len(f.values) for f in factors))
    return MatrixSubspaces(
        torch.tensor(inside, dtype=torch.float64),
        torch.tensor(pairs, dtype=torch.float64),
        rank,
        merged.missed(rank),
        interference(factors, share),
        directions,
        (task_matrices[0].shape[0], task_matrices[0].shape[1]),
    )


def cost(shape: Sequence[int], experts: int) -> float:
    """Return about how many floating-point operations `measure_subspaces` takes for [O, I]."""
    short, long = min(shape), max(shape)
    if short <= EXACT:
        each = 2 * short**2 * long * 2 + 10 * short**3
    else:
        width = RANK + linalg.OVERSAMPLING
        each = 2 * short * long * width * (2 + 2 * linalg.POWER_STEPS)
    width = short if short <= EXACT else RANK
    return (experts + 1) * each + (experts + 1) * experts * 2 * width * short * long


def _as_short(factors: Factors, matrix: Tensor) -> Tensor:
    """Return U S, as short as it can be, where all of a matrix is in it; else that."""
    is_whole = min(matrix.shape) <= EXACT and matrix.shape[0] < matrix.shape[1]
    return factors.left * factors.values.to(matrix.dtype) if is_whole else matrix
