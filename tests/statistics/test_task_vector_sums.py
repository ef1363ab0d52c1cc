"""Sums over task vectors: by hand, against brute force in float64, in parts, and out of range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergewell.statistics.task_vector_sums import TaskVectorSums

FIELDS = ("products", "mass", "pairs", "sums")


def models(size: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(size, generator=generator)
    taus = [0.01 * torch.randn(size, generator=generator) for _ in range(3)]
    return base.to(dtype), [(base + tau).to(dtype) for tau in taus]


def brute_force(base: Tensor, experts: list[Tensor]) -> TaskVectorSums:
    wide = base.double()
    taus = torch.stack([expert.double() - wide for expert in experts])
    rows = torch.cat([wide[None], taus])
    each = taus[:, None] * taus
    mass = torch.stack([taus.sum(0).abs().sum(), taus.abs().sum()])
    pairs = torch.stack([-each.clamp(max=0).sum(2), each.abs().sum(2)])
    return TaskVectorSums(rows @ rows.T, mass, pairs, taus.sum(1))


def assert_close(found: TaskVectorSums, wanted: TaskVectorSums, tolerance: float) -> None:
    """Compare each sum with the size of what was added up."""
    norms = wanted.products.diagonal().sqrt()
    scales = (norms[:, None] * norms, wanted.mass[1], wanted.pairs[1], wanted.mass[1])
    for name, scale in zip(FIELDS, scales, strict=True):
        error = (getattr(found, name) - getattr(wanted, name)).abs()
        assert bool((error <= tolerance * scale).all()), name


def test_by_hand() -> None:
    base = torch.tensor([3.0, 4.0])
    found = TaskVectorSums.of(base, [base + torch.tensor([1.0, 2]), base + torch.tensor([2.0, -1])])
    assert found.products.tolist() == [[25, 11, 2], [11, 5, 0], [2, 0, 5]]
    assert found.mass.tolist() == [4, 6]
    assert found.pairs.tolist() == [[[0, 2], [2, 0]], [[5, 4], [4, 5]]]
    assert found.sums.tolist() == [3, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2048, 100_003])
def test_as_brute_force(size: int, dtype: torch.dtype) -> None:
    base, experts = models(size, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-7
    assert_close(TaskVectorSums.of(base, experts), brute_force(base, experts), tolerance)


def test_parts_are_the_whole() -> None:
    base, experts = models(70_001)
    parts = [
        TaskVectorSums.of(base[cut], [expert[cut] for expert in experts])
        for cut in (slice(0, 5), slice(5, 40_000), slice(40_000, None))
    ]
    total = TaskVectorSums.zero(3) + parts[2] + parts[0] + parts[1]
    assert_close(total, brute_force(base, experts), 3e-7)


def test_an_expert_in_the_memory_of_the_base_did_not_move() -> None:
    base, experts = models(5000)
    found = TaskVectorSums.of(base, [experts[0], base, experts[1]])
    assert_close(found, brute_force(base, [experts[0], base.clone(), experts[1]]), 3e-7)
    assert not found.products[2].any() and not found.pairs[:, 1].any()
    none = TaskVectorSums.of(base, [base, base])
    assert float(none.products[0, 0]) == pytest.approx(float(base.double().square().sum()), 1e-6)
    assert float(none.products.abs().sum()) == float(none.products[0, 0])


def test_nothing_opposes_where_signs_agree() -> None:
    base, experts = models(9000)
    away = (experts[0] - base).abs()
    found = TaskVectorSums.of(torch.zeros(9000), [away, 3 * away, 0.1 * away])
    assert not found.pairs[0].any()
    assert float(found.mass[0]) == pytest.approx(float(found.mass[1]), rel=1e-6)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_what_float32_cannot_multiply_is_done_in_float64(size: float) -> None:
    _, experts = models(3000)
    experts = [size * expert for expert in experts]
    base = torch.zeros(3000)
    wanted = brute_force(base, experts)
    assert_close(TaskVectorSums.of(base, experts), wanted, 1e-12)
    assert float(wanted.products[1, 1]) > 0


def test_what_is_not_finite_shows() -> None:
    base, experts = models(3000)
    experts[1][2000] = torch.inf
    assert not bool(TaskVectorSums.of(base, experts).products.isfinite().all())
