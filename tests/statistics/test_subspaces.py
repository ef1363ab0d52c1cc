"""Decompositions, alignment (SAR) and interference (STI): by hand and against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mergewell.statistics.subspaces import (
    RESIDUAL,
    alignment,
    cost,
    decompose,
    interference,
    measure_subspaces,
)

SHAPES = [(12, 12), (20, 8), (8, 20)]


def randoms(count: int, shape: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def brute_alignment(matrix: Tensor, merged: Tensor) -> float:
    left, values, _ = torch.linalg.svd(merged, full_matrices=False)
    for rank in range(len(values) + 1):
        if values[rank:].norm() <= RESIDUAL * values.norm():
            break
    kept = left[:, :rank]
    return float((kept @ kept.T @ matrix).norm() / matrix.norm())


def brute_interference(matrices: list[Tensor]) -> float:
    rank = max(1, min(matrices[0].shape) // len(matrices))
    parts = [torch.linalg.svd(m, full_matrices=False) for m in matrices]
    left = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
    right = torch.cat([v[:rank] for _, _, v in parts], 0).T
    middle = torch.diag(torch.cat([s[:rank] for _, s, _ in parts]))
    one = torch.eye(left.shape[1], dtype=left.dtype)
    return float(((left.T @ left - one) @ middle @ (right.T @ right - one)).abs().sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exact_decomposition_is_the_matrix(shape: tuple[int, int]) -> None:
    (matrix,) = randoms(1, shape)
    found = decompose(matrix, seed=0)
    assert torch.allclose((found.left * found.values) @ found.right.T, matrix)
    assert torch.allclose(found.values, torch.linalg.svdvals(matrix))
    assert torch.allclose(found.left.T @ found.left, torch.eye(len(found.values)).double())
    assert found.missed(len(found.values)) == pytest.approx(0, abs=1e-6)
    assert found.missed(0) == 1


def test_the_rank_is_the_fewest_directions_that_miss_no_more() -> None:
    matrix = torch.diag(torch.tensor([3.0, 4.0, 0.2], dtype=torch.float64))
    found = decompose(matrix, seed=0)  # energies 16, 9, 0.04 of 25.04: missed 0.6, 0.04, 0
    assert [found.rank(r) for r in (0.7, 0.5, 0.05, 0.03)] == [1, 2, 2, 3]
    assert found.missed(2) == pytest.approx(math.sqrt(0.04 / 25.04))
    assert decompose(torch.zeros(3, 2), seed=0).rank() == 0


def test_directions_without_length_are_left_out() -> None:
    column, row = randoms(1, (9, 2))[0], randoms(1, (2, 7), 1)[0]
    assert len(decompose(column @ row, seed=0).values) == 2


@pytest.mark.parametrize("shape", [(80, 60), (60, 80)])
def test_a_randomised_decomposition_finds_low_rank_exactly(shape: tuple[int, int]) -> None:
    left, right = randoms(1, (shape[0], 5))[0], randoms(1, (5, shape[1]), 1)[0]
    matrix = left @ right
    found = decompose(matrix, seed=3, exact=10, rank=8)
    assert torch.allclose(found.values[:5], torch.linalg.svdvals(matrix)[:5])
    assert found.missed(5) == pytest.approx(0, abs=1e-6)
    again = decompose(matrix, seed=3, exact=10, rank=8)
    assert torch.equal(found.left, again.left)


def test_a_randomised_decomposition_states_what_it_misses() -> None:
    (matrix,) = randoms(1, (80, 80))
    found = decompose(matrix, seed=0, exact=10, rank=8)
    assert len(found.values) == 8 == found.rank()
    inside = found.left @ (found.left.T @ matrix)
    assert found.missed(8) == pytest.approx(float((matrix - inside).norm() / matrix.norm()))
    best = torch.linalg.svdvals(matrix)[8:].norm() / matrix.norm()
    assert best <= found.missed(8) < 1.02 * best


@pytest.mark.parametrize("shape", SHAPES)
def test_alignment_and_interference_as_brute_force(shape: tuple[int, int]) -> None:
    matrices = randoms(3, shape)
    coefficients = (0.5, 1.0, 0.2)
    found = measure_subspaces(matrices, coefficients)
    merged = sum((c * m for c, m in zip(coefficients, matrices, strict=True)), torch.zeros(shape))
    for i, matrix in enumerate(matrices):
        assert float(found.alignment[i]) == pytest.approx(brute_alignment(matrix, merged), rel=1e-5)
        for j, other in enumerate(matrices):
            expected = brute_alignment(matrix, other)
            assert float(found.pairs[i, j]) == pytest.approx(expected, rel=1e-5)
    # float32 vectors, whose rounding adds up to some 1e-7
    assert found.interference.value == pytest.approx(brute_interference(matrices), rel=1e-6)
    assert found.shape == shape and found.missed <= RESIDUAL


def test_alignment_by_hand() -> None:
    subspace = torch.tensor([[1.0], [0.0]])
    assert alignment(torch.tensor([[3.0], [4.0]]), subspace, norm=5.0) == pytest.approx(0.6)
    assert math.isnan(alignment(torch.zeros(2, 1), subspace, norm=0.0))
    assert alignment(torch.ones(2, 1), torch.zeros(2, 0), norm=2**0.5) == 0


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_identical_experts_interfere_as_the_square_of_their_number(experts: int) -> None:
    (matrix,) = randoms(1, (15, 15))
    factors = [decompose(matrix, seed=0)] * experts
    rank = 15 // experts
    total = experts * float(factors[0].values[:rank].sum())
    found = interference(factors, rank)
    assert found.value == pytest.approx((experts - 1) ** 2 * total)


def test_orthogonal_experts_do_not_interfere() -> None:
    first, second = torch.zeros(4, 4), torch.zeros(4, 4)
    first[0, 0], second[1, 1] = 2.0, 3.0
    found = measure_subspaces([first, second], (1.0, 1.0))
    assert found.interference.value == pytest.approx(0, abs=1e-12)
    assert found.alignment.tolist() == pytest.approx([1.0, 1.0])
    assert found.pairs.tolist() == [pytest.approx([1.0, 0.0]), pytest.approx([0.0, 1.0])]


def test_the_reference_is_what_random_directions_have() -> None:
    matrices = randoms(3, (150, 120))
    found = measure_subspaces(matrices, (1.0, 1.0, 1.0)).interference
    assert found.value == pytest.approx(found.unrelated, rel=0.02)


def test_an_expert_that_did_not_move_has_no_alignment() -> None:
    (moved,) = randoms(1, (6, 6))
    found = measure_subspaces([moved, torch.zeros_like(moved)], (1.0, 1.0))
    assert float(found.alignment[0]) == pytest.approx(1, abs=2e-3)
    assert math.isnan(found.alignment[1]) and found.pairs.isnan().sum() == 3
    assert found.interference.value == pytest.approx(0, abs=1e-12)


def test_task_vectors_that_cancel_are_outside_of_their_sum() -> None:
    (moved,) = randoms(1, (6, 6))
    assert measure_subspaces([moved, -moved], (1.0, 1.0)).alignment.tolist() == [0, 0]


def test_the_cost_grows_with_the_experts_and_not_with_the_cube_of_large_sides() -> None:
    assert cost((384, 384), 8) > 1.9 * cost((384, 384), 4)
    assert cost((4096, 4096), 4) < 5 * cost((2048, 2048), 4)
