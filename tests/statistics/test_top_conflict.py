"""Opposite signs among large entries: by hand, against brute force, and in parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergewell.statistics.base import State, joined
from mergewell.statistics.top_conflict import TopConflict
from mergewell.tensor_group import CHUNK, TensorGroup


def conflicts(*taus: Tensor, density: float) -> Tensor:
    """By passes; the form for a tensor that is held whole must say the same."""
    group = TensorGroup("w", taus, torch.ones(len(taus)), torch.zeros_like(taus[0]))
    found = TopConflict(density=density).measure([group])["w"]["conflicts"]
    assert torch.equal(TopConflict(density=density).of_whole(torch.stack(taus)), found)
    return found


def brute_force(taus: list[Tensor], density: float) -> Tensor:
    """Count entry by entry, with a sort."""
    size = taus[0].numel()
    kept = max(1, int(density * size))
    large = [t.abs() >= t.abs().sort(descending=True).values[kept - 1] for t in taus]
    counts = torch.zeros(2, len(taus), len(taus), dtype=torch.int64)
    for i, a in enumerate(taus):
        for j, b in enumerate(taus):
            for n in range(size):
                if (large[i][n] or large[j][n]) and a[n] != 0 and b[n] != 0:
                    counts[0, i, j] += int(a[n] * b[n] < 0)
                    counts[1, i, j] += 1
    return counts


def test_by_hand() -> None:
    # largest half of a: places 0, 1; of b: places 0, 2; compared: 0, 1, 2; opposed: 0 and 2
    a = torch.tensor([5.0, 4.0, -1.0, 0.5])
    b = torch.tensor([-3.0, 1.0, 2.0, -0.5])
    assert conflicts(a, b, density=0.5).tolist() == [[[0, 2], [2, 0]], [[2, 3], [3, 2]]]


def test_zeros_neither_oppose_nor_agree() -> None:
    a = torch.tensor([5.0, 4.0, 0.0, 0.0])
    b = torch.tensor([-3.0, 0.0, 2.0, 0.0])
    assert conflicts(a, b, density=0.5)[:, 0, 1].tolist() == [1, 1]


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_as_brute_force(density: float) -> None:
    generator = torch.Generator().manual_seed(1)
    taus = [torch.randn(200, generator=generator).round(decimals=1) for _ in range(3)]
    taus[2][:150] = 0  # fewer entries than the density asks for
    assert torch.equal(conflicts(*taus, density=density), brute_force(taus, density))


def test_an_unmoved_tensor_is_not_read_twice() -> None:
    zeros = torch.zeros(50)
    statistic = TopConflict()
    group = TensorGroup("w", (zeros, zeros), torch.ones(2), zeros)
    done = statistic.advance({}, statistic.update({}, group, 0), 0)
    assert not any(statistic.wanted(done, "w", index) for index in (1, 2, 3))
    assert conflicts(zeros, zeros, density=0.2).tolist() == [[[0, 0], [0, 0]]] * 2


def test_sparse_task_vectors_are_compared_without_a_threshold() -> None:
    a, b = torch.zeros(50), torch.zeros(50)
    a[0], b[0] = 1.0, -2.0
    assert conflicts(a, b, density=0.2)[:, 0, 1].tolist() == [1, 1]


def test_one_threshold_for_the_whole_model() -> None:
    small, large = torch.tensor([0.1, 0.2]), torch.tensor([3.0, 4.0])
    groups = [
        TensorGroup(name, (tau, -tau), torch.ones(2), torch.zeros(2))
        for name, tau in (("s", small), ("l", large))
    ]
    values = TopConflict(density=0.5, scope="model").measure(groups)
    assert [int(values[name]["conflicts"][0, 0, 1]) for name in "sl"] == [0, 2]


def test_parts_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(2)
    size = 2 * CHUNK + 3
    taus = tuple(torch.randn(size, generator=generator) for _ in range(3))
    statistic, base = TopConflict(density=0.1), torch.zeros(size)
    done: State = {}
    for index in range(statistic.passes):
        summed: State = {}
        for s, e in ((CHUNK, size), (0, CHUNK)):
            parts = tuple(t[s:e] for t in taus)
            part = TensorGroup("w", parts, torch.ones(3), base[s:e], offset=s, numel=size)
            if statistic.wanted(done, "w", index):
                summed = joined(summed, statistic.update(done, part, index))
        done = statistic.advance(done, summed, index)
    value = statistic.value(done, "w", size)["conflicts"]
    assert torch.equal(value, conflicts(*taus, density=0.1))


def test_a_large_tensor_held_whole_is_as_by_passes() -> None:
    generator = torch.Generator().manual_seed(3)
    taus = [torch.randn(2 * CHUNK + 7, generator=generator).round(decimals=2) for _ in range(3)]
    counts = conflicts(*taus, density=0.1)
    assert bool((counts[1] > 0).all()) and not counts[0].diagonal().any()
