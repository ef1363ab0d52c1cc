"""Opposite signs among large entries, beside the mass that cancels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergewell.diagnostics.base import Evidence
from mergewell.diagnostics.sign_conflict import SignConflict


def test_large_entries_are_counted_over_all_tensors(plain: Evidence) -> None:
    counts = {
        "u": torch.tensor([[[0, 3], [3, 0]], [[5, 6], [6, 5]]]),
        "v": torch.tensor([[[0, 1], [1, 0]], [[0, 10], [10, 0]]]),
    }
    found = SignConflict().measure(replace(plain, top_conflicts=counts))
    assert found.predictors["opposed_top_mean"] == pytest.approx(4 / 16)
    assert found.predictors["opposed_top"] == [[0, 0.25], [0.25, 0]]
    assert found.verdict.endswith("and 25 % of the largest entries oppose.")
    assert found.value == SignConflict().measure(plain).value


@pytest.mark.parametrize("experts", [1, 2])
def test_nothing_compared_is_nothing_said(plain: Evidence, experts: int) -> None:
    counts = {"u": torch.zeros(2, experts, experts, dtype=torch.int64)}
    found = SignConflict().measure(replace(plain, top_conflicts=counts))
    assert "opposed_top" not in found.predictors and found.verdict.endswith("one another.")
