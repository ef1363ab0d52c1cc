"""RegMean: by hand, its reductions, and from a calibration of toy models to their least squares."""

from __future__ import annotations

from dataclasses import replace

import torch
from grams import group, random_group

from mergewell.gram import averaged
from mergewell.methods.average import Average
from mergewell.methods.regmean import RegMean


def test_worked_example() -> None:
    # G_1 = [[2, 1], [1, 2]], G_2 = [[2, -1], [-1, 2]]; off the diagonal they count half
    made = group([[9, 9]], [[[1, 0]], [[0, 1]]], [[[2, 1], [1, 2]], [[2, -1], [-1, 2]]])
    # [1, 0] [[2, .5], [.5, 2]] + [0, 1] [[2, -.5], [-.5, 2]] = [1.5, 2.5]; the sum is 4 I
    found = RegMean(alpha=0.5).merge(made)
    torch.testing.assert_close(found, torch.tensor([[0.375, 0.625]], dtype=torch.float64))


def test_equal_inputs_give_the_average() -> None:
    made, _ = random_group()
    grams = made.calibration["gram"][:1].expand(3, -1, -1, -1)
    made = replace(made, calibration={**made.calibration, "gram": grams})
    torch.testing.assert_close(RegMean().merge(made), Average().merge(made))
    diagonal = torch.diag_embed(torch.ones(3, 1, 4, dtype=torch.float64))
    made = replace(made, calibration={**made.calibration, "gram": diagonal})
    torch.testing.assert_close(RegMean().merge(made), Average().merge(made))


def test_alpha_0_weighs_each_input_by_itself() -> None:
    made, inputs = random_group()
    squares = torch.stack([x.square().mean(0) for x in inputs])
    wanted = sum(s * w for s, w in zip(squares, made.experts, strict=True)) / squares.sum(0)
    assert isinstance(wanted, torch.Tensor)
    torch.testing.assert_close(RegMean(alpha=0.0).merge(made), wanted)


def test_it_does_not_depend_on_the_base_or_the_order() -> None:
    made, _ = random_group()
    found = RegMean().merge(made)
    assert torch.equal(found, RegMean().merge(replace(made, base=None)))
    known = {**made.calibration, "gram": made.calibration["gram"].flip(0)}
    turned = replace(made, experts=made.experts[::-1], calibration=known)
    torch.testing.assert_close(RegMean().merge(turned), found)
    moved = replace(made, experts=tuple(e + 3 for e in made.experts))
    torch.testing.assert_close(RegMean().merge(moved), found + 3)


def test_what_has_no_inputs_is_averaged() -> None:
    made, _ = random_group()
    method = RegMean().for_tensor("w", shape=(4, 4), guided=False)
    assert not method.needs.calibration and method.needs.granularity == "element"
    assert RegMean().needs.calibration == ("gram",) and not RegMean().needs.base
    assert torch.equal(RegMean().merge(replace(made, calibration={})), averaged(made))
    norm = group([1, 1], [[2, 2], [4, 8]], [[[[1]], [[1]]], [[[9]], [[9]]]])
    assert RegMean().merge(norm).tolist() == [3, 5]  # scales of norms are averaged
