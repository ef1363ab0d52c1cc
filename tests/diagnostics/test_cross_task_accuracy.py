"""Cross-task accuracy by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergewell.diagnostics.base import Evidence
from mergewell.diagnostics.cross_task_accuracy import CrossTaskAccuracy

NAN = float("nan")


def test_retention_on_others_tasks(plain: Evidence) -> None:
    accuracy = torch.tensor([[0.8, 0.3], [0.4, 0.9]])
    evidence = replace(plain, accuracy=accuracy, base_accuracy=torch.tensor([0.5, 0.2]))
    found = CrossTaskAccuracy().measure(evidence)
    assert found is not None
    # a keeps 0.3 / 0.9 of b's task, b 0.4 / 0.8 of a's
    assert found.value == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found.by_place == pytest.approx({"a": 0.5, "b": 1 / 3})
    assert found.predictors["cross_task_accuracy"] == pytest.approx(0.35)
    assert found.predictors["cross_task_gain"] == pytest.approx((0.1 - 0.1) / 2, abs=1e-7)
    assert "least a on b (33 %)" in found.verdict and found.where == "a"
    assert "lower its coefficient" in found.advice and not CrossTaskAccuracy.decides


def test_what_was_not_measured_is_left_out(plain: Evidence) -> None:
    accuracy = torch.tensor([[0.8, NAN], [0.4, 0.9]])
    found = CrossTaskAccuracy().measure(replace(plain, accuracy=accuracy))
    assert found is not None and found.value == pytest.approx(0.5)
    assert found.predictors["cross_task"][0][1] is None
    assert list(found.by_place) == ["a"] and "cross_task_gain" not in found.predictors


def test_what_cannot_be_judged_says_why(plain: Evidence) -> None:
    hopeless = replace(plain, accuracy=torch.tensor([[0.0, 0.3], [0.4, 0.0]]))
    alone = replace(plain, experts=("a",), accuracy=torch.tensor([[0.9]]))
    for evidence, reason in ((hopeless, "right at all"), (alone, "only one")):
        assert CrossTaskAccuracy().measure(evidence) is None
        assert reason in CrossTaskAccuracy().objection(evidence)
    assert CrossTaskAccuracy().measure(plain) is None
    assert CrossTaskAccuracy().objection(plain) == ""
