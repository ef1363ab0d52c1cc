"""Representation bias by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergewell.diagnostics.base import Evidence
from mergewell.diagnostics.representation_bias import RepresentationBias

# base, a, b, merged; gaps to a (0, -1), to b (2, -3); mean magnitudes 1.5 and 2.5
MODELS = torch.tensor([[[9.0, 9.0]], [[1.0, 2.0]], [[-1.0, 4.0]], [[1.0, 1.0]]])


def test_bias_by_hand(plain: Evidence) -> None:
    found = RepresentationBias().measure(replace(plain, features={"f": 7 * MODELS, "l": MODELS}))
    assert found is not None
    assert found.predictors["representation_bias_expert"] == pytest.approx({"a": 1 / 3, "b": 1.0})
    assert found.value == pytest.approx((1 / 3 + 1) / 2) and found.where == "l"
    assert found.by_place["f"] == pytest.approx(found.value), "scale does not matter"
    l2 = ((1 / 5) ** 0.5 + (13 / 17) ** 0.5) / 2
    assert found.predictors["representation_bias_l2"] == pytest.approx(l2)
    assert "farthest from those of b" in found.verdict and not RepresentationBias.decides


def test_equal_models_have_none(plain: Evidence) -> None:
    found = RepresentationBias().measure(replace(plain, features={"l": MODELS[:1].expand(4, 1, 2)}))
    assert found is not None and found.value == 0 and found.advice == ""


def test_features_that_are_zero_say_why(plain: Evidence) -> None:
    models = MODELS.clone()
    models[2] = 0
    evidence = replace(plain, features={"l": models})
    assert RepresentationBias().measure(evidence) is None
    assert "at l are zero" in RepresentationBias().objection(evidence)
    assert RepresentationBias().measure(plain) is None
    found = RepresentationBias().measure(replace(plain, features={"z": models, "l": MODELS}))
    assert found is not None and list(found.by_place) == ["l"]
