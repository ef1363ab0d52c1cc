"""Layer-wise linear feature connectivity by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergewell.diagnostics.base import Evidence
from mergewell.diagnostics.linear_connectivity import LinearConnectivity
from mergewell.models.barrier import Path

# base, expert a, expert b, merged; one sample: the mean is (1, 1), the merge (2, 0)
MODELS = torch.tensor([[[9.0, 9.0]], [[2.0, 0.0]], [[0.0, 2.0]], [[2.0, 0.0]]])


def test_cosine_and_norm_with_the_experts_mean(plain: Evidence) -> None:
    found = LinearConnectivity().measure(replace(plain, features={"b": MODELS}))
    assert found is not None
    assert found.value == found.by_place["b"] == pytest.approx(0.5**0.5)
    assert found.predictors["llfc_norm"] == pytest.approx(2**0.5)
    assert found.predictors["llfc_experts"] == pytest.approx(0)
    assert "ctl" not in found.predictors and not LinearConnectivity.decides


def test_the_mean_is_weighted_by_the_coefficients(plain: Evidence) -> None:
    evidence = replace(plain, features={"b": MODELS}, coefficients=(1.0, 0.0))
    found = LinearConnectivity().measure(evidence)
    assert found is not None and found.value == pytest.approx(1)


def test_shrunken_features_are_not_good_however_well_they_point(plain: Evidence) -> None:
    models = torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]], [[0.0, 2.0]], [[0.5, 0.5]]])
    found = LinearConnectivity().measure(replace(plain, features={"b": models}))
    assert found is not None and found.value == pytest.approx(1)
    assert found.predictors["llfc_norm"] == pytest.approx(0.5)
    assert found.level == "poor" and "shrink" in found.advice


def test_cross_task_linearity_is_read_from_the_paths(plain: Evidence) -> None:
    path = Path("a", "b", (0, 0.5, 1), (1, 1, 1), (1, 1, 1), 0.9, 0.4, "labels", "as stored", 8)
    found = LinearConnectivity().measure(replace(plain, features={"b": MODELS}, paths=(path,)))
    assert found is not None
    assert (found.predictors["ctl"], found.predictors["ctl_experts"]) == (0.9, 0.4)


def test_zero_features_have_no_direction(plain: Evidence) -> None:
    zero = torch.zeros(4, 3, 2)
    evidence = replace(plain, features={"z": zero})
    assert LinearConnectivity().measure(evidence) is None
    assert "zero" in LinearConnectivity().objection(evidence)
    found = LinearConnectivity().measure(replace(plain, features={"z": zero, "b": MODELS}))
    assert found is not None and list(found.by_place) == ["b"]
    assert LinearConnectivity().measure(plain) is None


def test_experts_that_cancel_have_no_mean(plain: Evidence) -> None:
    models = torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]], [[-1.0, 0.0]], [[1.0, 0.0]]])
    evidence = replace(plain, features={"b": models})
    assert LinearConnectivity().measure(evidence) is None
    assert LinearConnectivity().objection(evidence)


def test_one_expert(plain: Evidence) -> None:
    evidence = replace(plain, experts=("a",), features={"b": MODELS[[0, 1, 3]]})
    found = LinearConnectivity().measure(evidence)
    assert found is not None and found.value == pytest.approx(1)
    assert "llfc_experts" not in found.predictors
