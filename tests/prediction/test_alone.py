"""What an expert's own task tells of it, worked by hand."""

import math

import pytest
import torch

from mergewell.prediction.alone import ALONE, alone, beyond


def test_inputs_told_apart_are_not_alike() -> None:
    same, apart = torch.tensor([[3.0, 4.0], [6.0, 8.0]]), torch.eye(2)
    half = torch.tensor([[1.0, 0.0], [1.0, math.sqrt(3)]])  # 60 degrees
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0]])
    found = alone(same, apart, half, said=logits, said_further=torch.zeros(2, 2))
    assert tuple(found) == ALONE
    assert found["u_alike_base"] == pytest.approx(1.0)
    assert found["u_alike_own"] == pytest.approx(0.0)
    assert found["u_alike_beyond"] == pytest.approx(0.5)
    assert found["u_beyond_own"] == pytest.approx(0.5)  # 1/4 * 1/2 + 3/4 * 1/2
    sure = alone(same, apart, half, said=logits, said_further=logits)
    assert sure["u_beyond_own"] == pytest.approx(0.25**2 + 0.75**2)


def test_one_input_and_the_length_of_features_say_nothing() -> None:
    row, logits = torch.ones(1, 3), torch.zeros(1, 2)
    assert alone(row, row, row, said=logits, said_further=logits)["u_alike_own"] == 1.0
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    lengths, logits = torch.arange(1.0, 6.0)[:, None], torch.zeros(5, 2)
    plain = alone(features, features, features, said=logits, said_further=logits)
    longer = alone(features, lengths * features, features, said=logits, said_further=logits)
    assert plain == pytest.approx(longer, rel=1e-6)


def test_beyond_goes_on_as_far_again_and_leaves_what_was_counted() -> None:
    base = {"w": torch.tensor([1.0, 2.0]), "n.running_var": torch.ones(1), "i": torch.tensor(3)}
    expert = {
        "w": torch.tensor([1.5, 1.0]), "n.running_var": torch.full((1,), 0.1),
        "i": torch.tensor(5), "head": torch.ones(2),
    }  # fmt: skip
    found = beyond(base, expert)
    assert found["w"].tolist() == [2.0, 0.0]
    assert found["n.running_var"] is expert["n.running_var"]  # 1 - 1.8 would be no variance
    assert found["i"] is expert["i"]
    assert found["head"] is expert["head"]
