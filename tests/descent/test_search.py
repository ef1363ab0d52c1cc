"""Searches: they find a bowl's bottom, keep their bounds, and are seeded."""

from __future__ import annotations

import torch
from torch import Tensor

from mergewell.descent.search import bayesian, evolve, posterior

BOTTOM = torch.tensor([0.3, 0.8], dtype=torch.float64)


def bowl(point: Tensor) -> float:
    return float((point - BOTTOM).square().sum())


def test_evolution_begins_at_the_start_and_finds_the_bottom() -> None:
    start = torch.zeros(2, dtype=torch.float64)
    tried = evolve(bowl, start, low=-1.5, high=1.5, budget=80, seed=1)
    assert len(tried) == 80 and tried[0][0].tolist() == [0.0, 0.0]
    assert min(value for _, value in tried) < 1e-2
    assert all(float(point.abs().max()) <= 1.5 for point, _ in tried)
    again = evolve(bowl, start, low=-1.5, high=1.5, budget=80, seed=1)
    assert [value for _, value in again] == [value for _, value in tried]
    corner = evolve(lambda p: float(p.sum()), start, low=-0.1, high=1.0, budget=40, seed=0)
    assert min(value for _, value in corner) < -0.15


def test_bayes_beats_as_many_random_points() -> None:
    for acquisition in ("ei", "ucb"):
        tried = bayesian(lambda p: -bowl(p), 2, random=5, steps=15, acquisition=acquisition, seed=0)
        drawn = bayesian(lambda p: -bowl(p), 2, random=20, steps=0, acquisition=acquisition, seed=0)
        best = max(value for _, value in tried)
        assert len(tried) == len(drawn) == 20
        assert best > -1e-3 > max(value for _, value in drawn)
        assert all(float(p.min()) >= 0 and float(p.max()) <= 1 for p, _ in tried)
        again = bayesian(lambda p: -bowl(p), 2, random=5, steps=15, acquisition=acquisition, seed=0)
        assert max(value for _, value in again) == best


def test_the_posterior_knows_what_it_was_told_and_falls_back_to_the_mean() -> None:
    points = torch.tensor([[0.0], [0.4], [1.0]], dtype=torch.float64)
    values = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    mean, deviation = posterior(points, values, points)
    torch.testing.assert_close(mean, values, rtol=1e-4, atol=1e-4)
    assert float(deviation.max()) < 1e-2
    far, wide = posterior(points, values, torch.tensor([[1e6]], dtype=torch.float64))
    torch.testing.assert_close(far, values.mean()[None])
    torch.testing.assert_close(wide, values.std(correction=0)[None])


def test_equal_judgements_do_not_break_it() -> None:
    tried = bayesian(lambda _: 0.5, 3, random=2, steps=3, acquisition="ei", seed=2)
    assert len({tuple(point.tolist()) for point, _ in tried}) == 5
