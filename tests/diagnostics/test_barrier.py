"""Barriers on paths and at the merge, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mergewell.diagnostics.barrier import Barrier
from mergewell.diagnostics.base import Evidence
from mergewell.models.barrier import Path


def path(start: str, end: str, middle: float, *, task: str = "", accuracy: float = 0.9) -> Path:
    points, losses, accuracies = (0.0, 0.5, 1.0), (1.0, middle, 2.0), (0.9, accuracy, 0.9)
    return Path(
        start, end, points, losses, accuracies, 1.0, 1.0, "pseudo-labels", "as stored", 9, task
    )


def test_a_path_rises_above_the_line_between_its_ends() -> None:
    assert path("a", "b", 2.25, accuracy=0.7).barrier == 0.75
    assert path("a", "b", 2.25, accuracy=0.7).accuracy_barrier == pytest.approx(0.2)
    assert path("a", "b", 1.2).barrier == 0 == path("a", "b", 1.2).accuracy_barrier


def test_the_highest_path_is_the_value(plain: Evidence) -> None:
    paths = (path("a", "b", 2.25, task="x"), path("b", "a", 1.75, task="y"), path("base", "a", 1))
    found = Barrier().measure(replace(plain, paths=paths))
    assert found is not None
    assert found.value == 0.75 and found.where == "a to b on x" and found.level == "poor"
    assert found.predictors["barrier_mean"] == pytest.approx(1 / 3)
    assert found.predictors["barrier_pairs"] == [[0.0, 0.5], [0.5, 0.0]]
    assert "By pseudo-labels" in found.verdict and not Barrier.decides


def test_no_rise_is_said_so(plain: Evidence) -> None:
    found = Barrier().measure(replace(plain, paths=(path("base", "a", 1),)))
    assert found is not None and found.value == 0 and "nowhere" in found.verdict
    assert "barrier_pairs" not in found.predictors


def test_the_merge_is_held_against_its_experts_by_labels(plain: Evidence) -> None:
    # one sample, two classes; loss log(1 + exp(-margin)): margins 0, 2 of experts, -1 of the merge
    outputs = torch.tensor([[[9.0, 0.0]], [[0.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]])
    evidence = replace(plain, outputs=outputs, logits=True, labels=torch.tensor([0]))
    loss = [math.log(1 + math.exp(-margin)) for margin in (0, 2, -1)]
    found = Barrier().measure(evidence)
    assert found is not None
    assert found.value == pytest.approx(loss[2] - (loss[0] + loss[1]) / 2)
    assert found.predictors["barrier_merge_accuracy"] == 1 and "By labels" in found.verdict
    weighted = Barrier().measure(replace(evidence, coefficients=(0.0, 1.0)))
    assert weighted is not None and weighted.value == pytest.approx(loss[2] - loss[1])


def test_without_labels_the_ensemble_answers(plain: Evidence) -> None:
    outputs = torch.tensor([[[9.0, 0.0]], [[0.0, 1.0]], [[3.0, 0.0]], [[0.0, 1.0]]])
    labelled = replace(plain, outputs=outputs, logits=True, labels=torch.tensor([0]))
    found = Barrier().measure(replace(labelled, labels=None))
    assert found is not None and "By pseudo-labels" in found.verdict
    by_labels = Barrier().measure(labelled)
    assert by_labels is not None and found.value == by_labels.value


def test_features_and_ignored_labels_have_no_loss(plain: Evidence) -> None:
    outputs = torch.zeros(4, 1, 2)
    assert Barrier().measure(plain) is None
    assert Barrier().measure(replace(plain, outputs=outputs)) is None
    ignored = replace(plain, outputs=outputs, logits=True, labels=torch.tensor([-100]))
    assert Barrier().measure(ignored) is None
