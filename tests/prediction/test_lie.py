"""How a merge lies to its experts: worked by hand, and the linear merge without its weights."""

import pytest
import torch

from mergewell.prediction.lie import OF_EXPERTS, OF_MERGES, lie, products
from mergewell.prediction.predict import lifted

BASE = {"w": torch.tensor([3.0, 4.0]), "n": torch.tensor([7]), "still": torch.ones(3)}
ONE = BASE | {"w": torch.tensor([4.0, 4.0])}
OTHER = BASE | {"w": torch.tensor([3.0, 6.0])}
AVERAGE = BASE | {"w": torch.tensor([3.5, 5.0])}


def test_products_are_of_what_moved() -> None:
    total = products(BASE, [ONE, OTHER], AVERAGE)
    assert total.tolist() == [
        [25, 3, 8, 5.5], [3, 1, 0, 0.5], [8, 0, 4, 2], [5.5, 0.5, 2, 1.25],
    ]  # fmt: skip


def test_an_average_by_hand() -> None:
    numbers, each = lie(products(BASE, [ONE, OTHER], AVERAGE))
    assert each["w_kept"] == [0.5, 0.5]
    assert each["w_cosine"] == [0, 0]
    assert each["w_norm"] == [1 / 5, 2 / 5]
    assert each["w_others"] == [2, 0.5]
    assert each["w_base"] == pytest.approx([3 / 25, 8 / 25])
    assert each["w_away"] == pytest.approx([1.25**0.5, 1.25**0.5 / 2])
    assert numbers["w_merged_over_mean"] == pytest.approx(1.0)
    assert numbers["w_experts"] == 2
    assert {*each} == {*OF_EXPERTS}
    assert {*numbers} == {*OF_MERGES}


def test_a_linear_merge_needs_no_weights() -> None:
    generator = torch.Generator().manual_seed(3)
    base = {"a": torch.randn(5, 4, generator=generator)}
    experts = [{"a": base["a"] + torch.randn(5, 4, generator=generator)} for _ in range(3)]
    merged = {
        "a": base["a"]
        + 0.3 * sum(c * (e["a"] - base["a"]) for c, e in zip((1, 2, 0.5), experts, strict=True))
    }
    made = products(base, experts, merged)
    assert torch.allclose(lifted(made[:-1, :-1], (0.3, 0.6, 0.15)), made, rtol=1e-4, atol=1e-4)


def test_an_expert_of_another_base_points_back() -> None:
    generator = torch.Generator().manual_seed(4)
    base, other = ({"a": torch.randn(400, generator=generator)} for _ in range(2))
    _, each = lie(products(base, [other, {"a": base["a"] * 1.01}], base))
    assert each["w_base"][0] < -0.85 < each["w_base"][1]
