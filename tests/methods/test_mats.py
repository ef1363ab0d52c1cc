"""MaTS: by hand, from where it starts, and where it ends."""

from __future__ import annotations

from dataclasses import replace

import torch
from grams import group, random_group

from mergewell.methods.mats import Mats
from mergewell.methods.regmean import RegMean
from mergewell.methods.task_arithmetic import TaskArithmetic


def test_worked_example() -> None:
    # diagonal moments 1/2 [1, 3] and 1/2 [3, 1]; from the mean [2, 1] the residual is
    # 1/2 [-1 * 1 + 1 * 3, 1 * 3 - 1 * 1] = [1, 1], mapped by [2, 2] to [2, 2]: a step of 1/2
    grams = [[[1, 0], [0, 3]], [[3, 0], [0, 1]]]
    made = group([[0, 0]], [[[1, 2]], [[3, 0]]], grams)
    found = Mats(steps=1).merge(made)
    torch.testing.assert_close(found, torch.tensor([[2.5, 1.5]], dtype=torch.float64))


def test_many_steps_from_anywhere_are_regmean() -> None:
    made, _ = random_group(samples=30)
    wanted = RegMean(alpha=0.7).merge(made)
    for start in ("average", "task_arithmetic"):
        method = Mats.model_validate({"start": start, "alpha": 0.7})
        torch.testing.assert_close(method.merge(made), wanted)
        few = method.model_copy(update={"steps": 1}).merge(made)
        assert float((few - wanted).abs().max()) > 1e-4


def test_what_has_no_inputs_stays_at_the_start() -> None:
    made, _ = random_group()
    still = replace(made, calibration={})
    method = Mats(start="task_arithmetic", scale=0.4)
    assert torch.equal(method.merge(still), TaskArithmetic(scale=0.4).merge(still))
    assert method.needs.base and not Mats().needs.base
    assert not method.for_tensor("w", shape=(4, 4), guided=False).needs.calibration
