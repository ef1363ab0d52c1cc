"""What a merge answers beside its experts: worked by hand, and what must not change it."""

import math

import pytest
import torch

from mergewell.prediction.answers import UNLABELLED, answers
from mergewell.prediction.resemblance import ALIKE, resemblance

SURE = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
OPPOSITE = SURE.flip(1)


def test_a_merge_that_is_its_expert() -> None:
    found = answers(torch.zeros(2, 2), [SURE, OPPOSITE], SURE, expert=0)
    assert {*found} == {*UNLABELLED}
    assert found["u_agreement_own"] == 1.0
    assert found["u_cosine"] == pytest.approx(1.0)
    assert found["u_kl_own"] == pytest.approx(0.0, abs=1e-12)
    assert found["u_others_own"] == 0.0
    assert found["u_chance"] == 0.5
    assert found["u_held_mix"] == pytest.approx(1.0)
    assert found["u_mutual"] == pytest.approx(1 - found["u_entropy"])


def test_a_merge_that_answers_everything_alike() -> None:
    alike = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    found = answers(torch.zeros(2, 2), [SURE], alike, expert=0)
    p = 1 / (1 + math.exp(-2.0))
    assert found["u_mutual"] == pytest.approx(0.0, abs=1e-12)
    assert found["u_conf"] == pytest.approx(p)
    assert found["u_believed"] == pytest.approx(0.5)
    assert found["u_agreement_own"] == 0.5
    assert found["u_others_own"] == 1.0  # there are none to differ


def test_a_shift_of_all_logits_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    base, one, two, merged = torch.randn(4, 16, 5, generator=generator)
    plain = answers(base, [one, two], merged, expert=1)
    moved = answers(base + 3, [one - 2, two + 1], merged + 8, expert=1)
    assert plain == pytest.approx(moved, rel=1e-4, abs=1e-6)


def test_resemblance_is_one_for_the_expert_turned_and_stretched() -> None:
    generator = torch.Generator().manual_seed(1)
    base, one, two = torch.randn(3, 16, 6, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    found = resemblance(
        [base, one, two, 3 * two @ turn], [base, one, two, two], [one, two], expert=1
    )
    assert {*found} == {*ALIKE}
    assert found["u_cka_own"] == pytest.approx(1.0)
    assert found["u_norm_last"] == pytest.approx(3.0)
    assert found["u_cka_middle"] == pytest.approx(1.0)
    assert found["u_away_middle"] == 0.0
    assert abs(found["u_cka_base_own"]) < 0.6
    assert found["u_cka_said"] == pytest.approx(found["u_cka_said_own"])
