"""Sums of task vectors: by hand, in parts, and over the whole model."""

from __future__ import annotations

import torch
from torch import Tensor

from mergewell.statistics.base import State, joined
from mergewell.statistics.sums import Sums
from mergewell.tensor_group import CHUNK, TensorGroup


def group(name: str, base: Tensor, *experts: Tensor) -> TensorGroup:
    return TensorGroup(name, experts, torch.ones(len(experts)), base)


def test_sums_of_task_vectors_by_hand() -> None:
    first = group("a", torch.ones(2), torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0]))
    second = group("b", torch.zeros(1), torch.tensor([10.0]), torch.tensor([0.5]))
    each = Sums().measure([first, second])
    assert each["a"]["sums"].tolist() == [4.0, -1.0]
    assert each["b"]["sums"].tolist() == [10.0, 0.5]
    whole = Sums(scope="model").measure([first, second])
    assert whole["a"]["sums"].tolist() == whole["b"]["sums"].tolist() == [14.0, -0.5]


def test_blocks_in_any_order_give_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    size = 2 * CHUNK + 5
    base, one, two = (torch.randn(size, generator=generator) for _ in range(3))
    whole = group("w", base, one, two)
    parts = [
        TensorGroup("w", (one[s:e], two[s:e]), torch.ones(2), base[s:e], offset=s, numel=size)
        for s, e in ((CHUNK, size), (0, CHUNK))
    ]
    state: State = {}
    for part in parts:
        state = joined(state, Sums().update({}, part, 0))
    value = Sums().value(state, "w", size)["sums"]
    assert torch.equal(value, Sums().measure([whole])["w"]["sums"])
    assert torch.allclose(value, torch.stack([one - base, two - base]).double().sum(1), rtol=1e-6)
