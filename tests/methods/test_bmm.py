"""BMM: by hand, its two ends, and the anchors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grams import group, random_group

from mergewell.errors import RecipeError
from mergewell.methods.base import METHODS
from mergewell.methods.bmm import Bmm
from mergewell.methods.regmean import RegMean
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.ties import Ties


def test_worked_example() -> None:
    # moments 1/2 * [2, 4] for both; their mean square is 3, so mu 0.5 adds 1.5 to [2, 4]
    grams = [[[2, 0], [0, 4]], [[2, 0], [0, 4]]]
    made = group([[0, 0]], [[[10, 20]], [[20, 40]]], grams)
    # the anchor is the base plus 0.3 times the sum, [9, 18], the experts' mean [15, 30]
    found = Bmm(mu=0.5, anchor="task_arithmetic").merge(made)
    wanted = [[(2 * 15 + 1.5 * 9) / 3.5, (4 * 30 + 1.5 * 18) / 5.5]]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("anchor", ["average", "task_arithmetic", "ties"])
def test_a_strong_prior_is_the_anchor_and_none_is_regmean(anchor: str) -> None:
    made, _ = random_group(samples=30)
    strong = Bmm(mu=1e9, anchor=anchor).merge(made)
    torch.testing.assert_close(strong, METHODS.build(anchor, {}).merge(made), atol=1e-8, rtol=0)
    none = Bmm(mu=0.0, anchor=anchor).merge(made)
    torch.testing.assert_close(none, RegMean(alpha=1.0).merge(made))


def test_it_needs_what_its_anchor_needs() -> None:
    method = Bmm(anchor="ties")
    assert method.needs.base and method.needs.granularity == "matrix"
    assert method.statistics() == Ties().statistics()
    assert not Bmm().needs.base and Bmm(anchor="m_ties").needs.calibration == ("gram", "m_loss")
    assert (
        Bmm(anchor="task_arithmetic").for_tensor("w", shape=(4, 4), guided=False)
        == TaskArithmetic()
    )
    assert Bmm().merge(replace(random_group()[0], calibration={})).shape == (5, 4)


def test_an_anchor_that_is_none() -> None:
    with pytest.raises(RecipeError, match="its own anchor"):
        METHODS.build("bmm", {"anchor": "bmm"})
    with pytest.raises(RecipeError, match="did you mean 'ties'"):
        METHODS.build("bmm", {"anchor": "tie"})
    assert "negative" in Bmm().objection([1, -1])
