"""The solve that the Gram methods share: by hand, against brute force, and where it must not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grams import group, random_group
from torch import Tensor

from mergewell.gram import Inputs, anchored, averaged, conjugate_gradients, divided, not_shares


def of(made: object) -> Inputs:
    assert isinstance(made, Inputs)
    return made


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_worked_example() -> None:
    # one row, two inputs; experts [1, 0] and [0, 1] see only their own input, the second more
    made = group([[0, 0]], [[[1, 0]], [[0, 1]]], [[[1, 0], [0, 0]], [[0, 0], [0, 4]]])
    inputs = of(Inputs.of(made))
    assert inputs.moments.flatten().tolist() == [0.5, 0, 0, 0, 0, 0, 0, 2]
    assert inputs.size == 1.25  # mean of 0.5 and 2
    # without a ridge each keeps its own: [1, 1]; towards [0, 0] by 0.5: 0.5 / 1 and 2 / 2.5
    zero = torch.zeros(1, 2, dtype=torch.float64)
    assert anchored(made, zero, inputs)[0].tolist() == pytest.approx([1, 1])
    assert anchored(made, zero, inputs, ridge=0.5)[0].tolist() == pytest.approx([0.5, 0.8])


def test_gram_matrices_count_by_coefficient_and_not_by_rows() -> None:
    made = group(
        [[0]], [[[1]], [[4]]], [[[10]], [[2]]], rows=[10, 1], coefficients=[3, 1]
    )  # moments 3/4 * 10/10 and 1/4 * 2: (0.75 * 1 + 0.5 * 4) / 1.25
    assert anchored(made, averaged(made), of(Inputs.of(made))).item() == pytest.approx(2.2)


def test_it_is_the_least_squares_solution_on_the_inputs() -> None:
    made, inputs = random_group((5, 4))
    best = anchored(made, averaged(made), of(Inputs.of(made)))
    stacked = torch.cat(inputs)
    wanted = torch.cat([x @ w.T for x, w in zip(inputs, made.experts, strict=True)])
    torch.testing.assert_close(best.T, torch.linalg.lstsq(stacked, wanted).solution)


def test_directions_that_no_input_has_stay_at_the_anchor() -> None:
    made, inputs = random_group((5, 8), samples=1)  # three inputs in eight dimensions
    anchor = made.required_base
    best = anchored(made, anchor, of(Inputs.of(made)))
    seen = torch.cat(inputs)
    for x, w in zip(inputs, made.experts, strict=True):  # few enough that all can be met
        torch.testing.assert_close(x @ best.T, x @ w.T)
    unseen = torch.eye(8, dtype=torch.float64) - torch.linalg.pinv(seen) @ seen
    torch.testing.assert_close((best - anchor) @ unseen, torch.zeros(5, 8, dtype=torch.float64))
    assert float((best - anchor).abs().max()) < 1  # no noise was inverted


def test_equal_experts_and_a_single_one_come_back_bitwise() -> None:
    made, _ = random_group((5, 4), dtype=torch.float32)
    same = replace(made, experts=(made.experts[0],) * 3)
    assert torch.equal(anchored(same, averaged(same), of(Inputs.of(same))), made.experts[0])
    one, _ = random_group((5, 4), experts=1, samples=2)
    assert torch.equal(anchored(one, averaged(one), of(Inputs.of(one))), one.experts[0])


def test_dead_and_badly_scaled_inputs() -> None:
    whole = torch.tensor([[[4.0, 0, 0], [0, 0, 0], [0, 0, 1e-14]]], dtype=torch.float64)
    right = torch.tensor([[[8.0, 0, 3e-14]]], dtype=torch.float64)
    assert divided(right, whole).flatten().tolist() == pytest.approx([2, 0, 3])


def test_a_matrix_that_cannot_be_factored_is_pseudo_inverted() -> None:
    one = drawn(3, 6)
    whole = torch.stack([one.T @ one, one.T @ one + torch.eye(6)])
    right = drawn(2, 4, 6, seed=1)
    found = divided(right, whole)
    pseudo = torch.linalg.pinv(whole[0], hermitian=True, rtol=1e-12)
    torch.testing.assert_close(found[0], right[0] @ pseudo)
    torch.testing.assert_close(found[1], right[1] @ whole[1].inverse())
    # a larger cutoff takes the weakest direction for unseen
    spread = torch.diag(torch.tensor([1.0, 0.1, 0.001], dtype=torch.float64))
    turn = torch.linalg.qr(drawn(3, 3)).Q
    weak = (turn @ spread @ turn.T)[None]
    cut = divided(turn.T[None], weak, cutoff=0.01)[0] @ turn
    torch.testing.assert_close(cut, torch.diag(torch.tensor([1.0, 10.0, 0.0], dtype=torch.float64)))


def test_conjugate_gradients_end_at_the_inverse_and_begin_along_the_residual() -> None:
    one = drawn(20, 6)
    whole, right = (one.T @ one)[None], drawn(1, 4, 6, seed=1)
    found = conjugate_gradients(right, whole, steps=50)
    torch.testing.assert_close(found, divided(right, whole), rtol=1e-8, atol=1e-10)
    first = conjugate_gradients(right, whole, steps=1)
    step = (right**2).sum(-1) / ((right @ whole) * right).sum(-1)
    torch.testing.assert_close(first, step[..., None] * right)
    singular = (one[:2].T @ one[:2])[None]
    inside = right @ singular
    found = conjugate_gradients(inside, singular, steps=50)
    torch.testing.assert_close(found @ singular, inside, rtol=1e-7, atol=1e-9)
    assert conjugate_gradients(0 * right, whole, steps=3).abs().max() == 0


def test_weights_of_every_shape_are_laid_by_their_inputs() -> None:
    conv = drawn(6, 2, 3, 3)  # three groups of two channels
    inputs = Inputs(torch.zeros(1, 3, 18, 18), 1)
    laid = inputs.laid(conv)
    assert laid.shape == (3, 2, 18) and torch.equal(laid[1, 0], conv[2].flatten())
    assert torch.equal(inputs.back(laid, conv), conv)
    turned = Inputs(torch.zeros(1, 1, 4, 4), 0)
    weight = drawn(4, 7)
    assert torch.equal(turned.laid(weight)[0], weight.T)
    assert torch.equal(turned.back(turned.laid(weight), weight), weight)
    norm = Inputs(torch.zeros(1, 5, 1, 1), 1)
    assert norm.laid(drawn(5)).shape == (5, 1, 1)
    assert norm.back(norm.laid(drawn(5)), drawn(5)).shape == (5,)


def test_coefficients_that_are_no_shares() -> None:
    assert "negative" in not_shares([1, -0.5]) and "sum to 0" in not_shares([0, 0])
    assert not not_shares([1, 0])
