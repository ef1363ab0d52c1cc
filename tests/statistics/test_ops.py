"""Order statistics of any score against sorts, sums against blocks."""

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergewell.statistics import ops
from mergewell.statistics.ops import OrderStatistic, key_value, reached, sort_key
from mergewell.tensor_group import CHUNK, TensorGroup, Value

NUMBERS = [0.0, -0.0, -0.5, 0.5, 1.0, -1.0, 3.0, -1e-30, 1e-42]


class Places(OrderStatistic):
    """Signed scores at the given places from the top."""

    signed: ClassVar[bool] = True
    places: tuple[int, ...]

    def scores(self, group: TensorGroup, stage: int, found: Value) -> Sequence[Tensor]:
        return list(group.experts)

    def ranks(self, stage: int, counts: Tensor, positive: Tensor) -> Tensor:
        return torch.tensor([list(self.places)] * len(counts))


def group(*experts: Tensor, offset: int = 0, numel: int = -1) -> TensorGroup:
    return TensorGroup("w", experts, torch.ones(len(experts)), offset=offset, numel=numel)


def test_keys_sort_as_the_numbers_do_and_give_them_back() -> None:
    numbers = torch.tensor([-3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0000001, 3e38])
    keys = sort_key(numbers)
    assert keys.tolist() == sorted(keys.tolist())
    assert keys[3] == keys[4] == 0
    assert torch.equal(key_value(keys).float(), numbers)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=40),
    others=st.lists(st.sampled_from(NUMBERS), min_size=40, max_size=40),
    places=st.lists(st.integers(0, 40), min_size=1, max_size=3),
)
def test_scores_and_masks_are_those_of_a_stable_sort(
    values: list[float], others: list[float], places: list[int]
) -> None:
    size = len(values)
    wanted = tuple(min(place, size) for place in places)
    tensors = group(torch.tensor(values), torch.tensor(others[:size]))
    value = Places(places=wanted).measure([tensors])["w"]
    for row, (expert, place) in enumerate((e, p) for e in tensors.experts for p in wanted):
        ordered = expert.sort(descending=True, stable=True)
        if place:
            assert key_value(value["key"][row]).float() == ordered.values[place - 1]
        expected = torch.zeros(size, dtype=torch.bool)
        expected[ordered.indices[:place]] = True
        assert torch.equal(reached(sort_key(expert), value, row, 0), expected)


def test_sums_over_chunks_and_rows_do_not_depend_on_blocks() -> None:
    torch.manual_seed(0)
    numbers = torch.randn(2 * CHUNK + 77) * 10.0 ** torch.randint(-6, 6, (2 * CHUNK + 77,))
    whole = ops.chunk_sums(group(numbers), [numbers])
    parts = torch.zeros_like(whole)
    for start in range(0, numbers.numel(), CHUNK):
        part = numbers[start : start + CHUNK]
        parts = parts + ops.chunk_sums(group(part, offset=start, numel=numbers.numel()), [part])
    assert torch.equal(parts, whole)
    assert float(whole.sum()) == pytest.approx(float(numbers.double().sum()), rel=1e-9)

    matrix = numbers[:120_000].view(300, 400)
    held = ops.total_of_rows(ops.row_sums(group(matrix), [matrix, matrix.abs()]), "w")
    for size in (1, 7, 100):
        state: dict[str, Tensor] = {}
        for start in range(0, 300, size):
            part = matrix[start : start + size]
            seen = group(part, offset=400 * start, numel=120_000)
            state |= ops.row_sums(seen, [part, part.abs()])
        assert torch.equal(ops.total_of_rows(state, "w"), held)
    assert float(held[1]) == pytest.approx(float(matrix.double().abs().sum()))


@pytest.mark.parametrize(("shape", "rows"), [((), (1, 1)), ((5,), (1, 5)), ((2, 3, 4), (2, 12))])
def test_rows_are_output_units(shape: tuple[int, ...], rows: tuple[int, int]) -> None:
    assert ops.rows_of(torch.zeros(shape)).shape == rows
