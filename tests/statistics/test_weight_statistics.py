"""Inner products and kept norms: by hand, and cut and joined."""

from __future__ import annotations

import pytest
import torch

from mergewell.statistics.base import State, WeightStatistic, joined
from mergewell.statistics.inner_products import InnerProducts
from mergewell.statistics.kept_norm import KeptNorm
from mergewell.statistics.magnitude import MagnitudeThreshold
from mergewell.tensor_group import CHUNK, TensorGroup

STATISTICS = [
    InnerProducts(of="task_vectors"),
    InnerProducts(of="experts"),
    KeptNorm(density=0.3),
    MagnitudeThreshold(density=0.2),
]


def group(size: int) -> TensorGroup:
    generator = torch.Generator().manual_seed(0)
    base, *experts = (torch.randn(size, generator=generator) for _ in range(4))
    return TensorGroup("w", tuple(experts), torch.ones(3), base)


def cut(whole: TensorGroup, size: int) -> list[TensorGroup]:
    assert whole.base is not None
    return [
        TensorGroup(
            whole.name,
            tuple(e[start : start + size] for e in whole.experts),
            whole.coefficients,
            whole.base[start : start + size],
            offset=start,
            numel=whole.whole_numel,
        )
        for start in range(0, whole.whole_numel, size)
    ]


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("chunks", [1, 2])
def test_parts_joined_in_any_order_are_the_whole(statistic: WeightStatistic, chunks: int) -> None:
    whole = group(3 * CHUNK + 17)
    done: State = {}
    for index in range(statistic.passes):
        summed: dict[str, torch.Tensor] = {}
        for part in reversed(cut(whole, chunks * CHUNK)):
            if statistic.wanted(done, "w", index):
                summed = joined(summed, statistic.update(done, part, index))
        done = statistic.advance(done, summed, index)
    value = statistic.value(done, "w", whole.whole_numel)
    expected = statistic.measure([whole])["w"]
    assert value.keys() == expected.keys()
    assert all(torch.equal(value[key], expected[key]) for key in value)


def test_inner_products_by_hand() -> None:
    base = torch.tensor([3.0, 4.0])
    experts = (torch.tensor([3.3, 4.4]), torch.tensor([3.0, 3.0]))
    tensors = TensorGroup("w", experts, torch.ones(2), base)
    products = tensors.statistic(InnerProducts(of="task_vectors"))["products"]
    expected = torch.tensor([[0.25, -0.4], [-0.4, 1]]).double()
    torch.testing.assert_close(products, expected, atol=1e-5, rtol=0)


def test_random_numbers_are_uniform_and_keyed_by_position() -> None:
    whole = group(2 * CHUNK)
    numbers = whole.uniform(1)
    parts = torch.cat([part.uniform(1) for part in cut(whole, CHUNK)])
    assert torch.equal(numbers, parts)
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    counts = torch.histc(numbers, 16, 0, 1)
    expected = numbers.numel() / 16
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 37.7, "15 degrees of freedom, p = 0.001"
    assert abs(float(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1])) < 0.012
