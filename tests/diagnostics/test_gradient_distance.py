"""Gradient distances by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergewell.diagnostics.base import Evidence
from mergewell.diagnostics.gradient_distance import GradientDistance
from mergewell.models.gradients import Gradients


def gradients(at: str, *vectors: list[float], samples: int = 200) -> Gradients:
    held = torch.tensor(vectors, dtype=torch.float64)
    names = tuple("abc"[: len(vectors)])
    products = {"u": held[:, :1] @ held[:, :1].T, "v": held[:, 1:] @ held[:, 1:].T}
    return Gradients(at, names, products, (samples,) * len(vectors), "labels")


def test_distance_and_cosine_over_all_parameters(plain: Evidence) -> None:
    both = (gradients("base", [3.0, 0.0], [0.0, 4.0]), gradients("merged", [3.0, 4.0], [3.0, 4.0]))
    found = GradientDistance().measure(replace(plain, gradients=both))
    assert found is not None
    assert found.predictors["gradient_distance_base"] == 5
    assert found.predictors["gradient_cosine_base"] == 0
    assert found.predictors["gradient_distance_merged"] == 0
    assert found.predictors["gradient_cosines_merged"][0][1] == pytest.approx(1)
    assert found.value == 0 and found.level == "good" and not GradientDistance.decides


@pytest.mark.parametrize(
    ("other", "expected"), [([0.0, 2.0], 1.0), ([-2.0, 0.0], 2**0.5), ([0.0, 0.0], 1.0)]
)
def test_one_is_the_distance_of_orthogonal_gradients(
    plain: Evidence, other: list[float], expected: float
) -> None:
    measured = gradients("base", [2.0, 0.0], other, [5.0, 5.0])
    products = {name: p[:2, :2] for name, p in measured.products.items()}
    evidence = replace(plain, gradients=(replace(measured, products=products),))
    found = GradientDistance().measure(evidence)
    if other == [0.0, 0.0]:
        assert found is None and "fewer than two" in GradientDistance().objection(evidence)
    else:
        assert found is not None and found.value == pytest.approx(expected)


def test_few_samples_are_warned_of(plain: Evidence) -> None:
    few = gradients("base", [2.0, 0.0], [0.0, 2.0], samples=10)
    found = GradientDistance().measure(replace(plain, gradients=(few,)))
    assert found is not None and "only 10 samples" in found.verdict and "100" in found.advice


def test_one_expert_has_no_distance(plain: Evidence) -> None:
    evidence = replace(plain, gradients=(gradients("base", [1.0, 2.0]),))
    assert GradientDistance().measure(evidence) is None
    assert "only one" in GradientDistance().objection(evidence)
    assert GradientDistance().measure(plain) is None
