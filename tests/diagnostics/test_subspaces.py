"""Subspace alignment and task interference as findings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergewell.diagnostics.base import Evidence
from mergewell.diagnostics.subspace_alignment import SubspaceAlignment
from mergewell.diagnostics.task_interference import TaskInterference
from mergewell.statistics.subspaces import Interference, MatrixSubspaces, measure_subspaces

NAN = float("nan")


def matrix(
    alignment: list[float], *, missed: float = 0.04, value: float = 3.0, unrelated: float = 2.0
) -> MatrixSubspaces:
    shares = torch.tensor(alignment, dtype=torch.float64)
    return MatrixSubspaces(
        shares, shares.expand(2, 2), 25, missed, Interference(value, unrelated), 8, (100, 64)
    )


def test_alignment_is_the_mean_over_matrices_and_experts(plain: Evidence) -> None:
    held = {"u": matrix([0.9, 0.5]), "v": matrix([0.7, NAN])}
    found = SubspaceAlignment().measure(replace(plain, subspaces=held))
    assert found is not None
    assert found.predictors["sar_expert"] == pytest.approx({"a": 0.8, "b": 0.5})
    assert found.value == pytest.approx(0.65) and found.level == "poor"
    assert found.by_place == pytest.approx({"u": 0.7, "v": 0.7})
    assert found.predictors["sar_unrelated"] == pytest.approx(0.5), "25 directions of 100"
    assert "least of b (50 %)" in found.verdict and "bound" not in found.verdict
    assert not SubspaceAlignment.decides


def test_lower_bounds_are_called_so(plain: Evidence) -> None:
    held = {"u": matrix([0.9, 0.9], missed=0.3), "v": matrix([0.9, 0.9])}
    found = SubspaceAlignment().measure(replace(plain, subspaces=held))
    assert found is not None and "Lower bounds in 1 of 2" in found.verdict


def test_interference_is_relative_to_unrelated_directions(plain: Evidence) -> None:
    held = {"u": matrix([1, 1]), "v": matrix([1, 1], value=1.0), "x": matrix([1, 1], unrelated=0)}
    found = TaskInterference().measure(replace(plain, subspaces=held))
    assert found is not None
    assert found.by_place == {"u": 1.5, "v": 0.5} and found.value == 1.0
    assert found.where == "u" and found.level == "good" and not TaskInterference.decides


def test_one_expert_has_nobody_to_align_or_interfere_with(plain: Evidence) -> None:
    task = torch.eye(4, dtype=torch.float64)
    evidence = replace(plain, experts=("a",), subspaces={"w": measure_subspaces([task], (1.0,))})
    for diagnostic in (SubspaceAlignment(), TaskInterference()):
        assert diagnostic.measure(evidence) is None
        assert "only one" in diagnostic.objection(evidence)
        assert diagnostic.measure(plain) is None and diagnostic.objection(plain) == ""


def test_a_matrix_that_only_one_moved_cannot_interfere(plain: Evidence) -> None:
    task = torch.eye(4, dtype=torch.float64)
    held = {"w": measure_subspaces([task, torch.zeros_like(task)], (1.0, 1.0))}
    evidence = replace(plain, subspaces=held)
    assert TaskInterference().measure(evidence) is None
    assert "moved by two" in TaskInterference().objection(evidence)
    found = SubspaceAlignment().measure(evidence)
    assert found is not None and found.value == pytest.approx(1)
