"""Dispersion around the mean: by hand, and what unmoved tensors do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergewell.diagnostics.base import Evidence
from mergewell.diagnostics.norm_dispersion import NormDispersion


def test_dispersion_by_hand(plain: Evidence) -> None:
    # mean tau (0.15, -0.3); distances^2 of both from it: 0.15^2 + 0.7^2 = 0.5125; of 25
    found = NormDispersion().measure(plain)
    assert found.predictors["dispersion"] == pytest.approx(0.5125)
    assert found.value == found.by_place["w"] == pytest.approx(0.5125 / 25)
    # norms 0.5 and 1: mean 0.75, deviation 0.25
    assert found.predictors["norm_variation"] == pytest.approx(1 / 3)
    assert found.level == "poor" and found.where == "w" and not NormDispersion.decides


def test_tensors_that_nobody_moved_do_not_hide_the_dispersion(plain: Evidence) -> None:
    still = torch.zeros(3, 3, dtype=torch.float64)
    still[0, 0] = 1e9
    found = NormDispersion().measure(replace(plain, products={**plain.products, "v": still}))
    assert found.value == pytest.approx(0.5125 / 25) and "v" not in found.by_place


@pytest.mark.parametrize("experts", [1, 2])
def test_one_expert_and_equal_experts_have_none(plain: Evidence, experts: int) -> None:
    vectors = torch.tensor([[3.0, 4.0], *[[0.3, 0.4]] * experts], dtype=torch.float64)
    evidence = replace(plain, experts=("a", "b")[:experts], products={"w": vectors @ vectors.T})
    found = NormDispersion().measure(evidence)
    assert found.value == pytest.approx(0, abs=1e-15) and found.level == "good"


def test_experts_that_did_not_move(plain: Evidence) -> None:
    products = torch.zeros(3, 3, dtype=torch.float64)
    products[0, 0] = 25
    found = NormDispersion().measure(replace(plain, products={"w": products}))
    assert found.value == 0 and found.by_place == {} and found.where == ""
