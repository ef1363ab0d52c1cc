"""LOT: by hand, the scales of norms, and its reductions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grams import group, random_group

from mergewell.methods.lot import Lot
from mergewell.methods.regmean import RegMean
from mergewell.methods.task_arithmetic import TaskArithmetic


def test_worked_example() -> None:
    # experts see one input each; the third input nobody: there the base stays
    grams = [[[1, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 3, 0], [0, 0, 0]]]
    made = group([[1, 1, 1]], [[[3, 9, 9]], [[9, 2, 9]]], grams)
    torch.testing.assert_close(
        Lot(scale=1.5).merge(made), torch.tensor([[4.0, 2.5, 1.0]], dtype=torch.float64)
    )


def test_scales_of_norms() -> None:
    # T = [1, 3] and [3, -1] with squares [1, 1] and [3, 1]: [(1 + 9) / 4, (3 - 1) / 2]
    grams = [[[[1]], [[1]]], [[[3]], [[1]]]]
    made = group([1, 1], [[2, 4], [4, 0]], grams)
    torch.testing.assert_close(
        Lot(scale=1.0).merge(made), torch.tensor([3.5, 2.0], dtype=torch.float64)
    )


def test_with_inputs_in_all_directions_it_is_regmean() -> None:
    made, _ = random_group(samples=30)
    torch.testing.assert_close(Lot(scale=1.0).merge(made), RegMean(alpha=1.0).merge(made))


def test_what_has_no_inputs_gets_the_mean_task_vector() -> None:
    made, _ = random_group()
    still = replace(made, calibration={})
    wanted = TaskArithmetic(scale=1.2, divide="count").merge(still)
    torch.testing.assert_close(Lot().merge(still), wanted)
    assert Lot().for_tensor("w", shape=(4, 4), guided=False).needs.granularity == "element"
    assert Lot().for_tensor("w", shape=(4, 4), guided=False).needs.base


def test_weak_directions_are_taken_as_unseen() -> None:
    made = group([[0, 0]], [[[1, 1]]], [[[1, 0], [0, 1e-3]]])
    assert Lot(scale=1.0).merge(made)[0].tolist() == pytest.approx([1, 1])
    assert Lot(scale=1.0, cutoff=0.01).merge(made)[0].tolist() == pytest.approx([1, 0])
