"""The exact threshold against a sort, cut and joined in every way."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergewell.methods import ops
from mergewell.statistics.base import WeightStatistic
from mergewell.statistics.magnitude import MagnitudeThreshold, magnitude_key
from mergewell.tensor_group import CHUNK, TensorGroup


def tensors(values: list[torch.Tensor], name: str = "w") -> TensorGroup:
    base = torch.zeros_like(values[0])
    return TensorGroup(name, tuple(values), torch.ones(len(values)), base)


def by_sorting(tau: torch.Tensor, kept: int) -> torch.Tensor:
    order = tau.abs().sort(descending=True, stable=True).indices[:kept]
    return torch.zeros_like(tau, dtype=torch.bool).scatter_(0, order, True)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([0.0, -0.5, 0.5, 1.0, -1.0, 3.0, 1e-30]), min_size=1, max_size=40
    ),
    density=st.floats(0.01, 1.0),
)
def test_mask_is_that_of_a_stable_sort(values: list[float], density: float) -> None:
    tau = torch.tensor(values)
    mask = ops.largest(tensors([tau]), 0, MagnitudeThreshold(density=density))
    kept = max(1, int(density * len(values) + 1e-9))
    assert torch.equal(mask, by_sorting(tau, kept))


def test_blocks_of_a_large_tensor_keep_the_same_entries_as_the_whole() -> None:
    torch.manual_seed(0)
    taus = [torch.round(torch.randn(2 * CHUNK + 100) * 20) / 20 for _ in range(2)]
    statistic = MagnitudeThreshold(density=0.2)
    whole = tensors(taus)
    value = statistic.measure([whole])["w"]
    assert "ties_before" in value, "the example must have ties to cut"
    for expert in range(2):
        parts = []
        for start in range(0, taus[0].numel(), CHUNK):
            part = tensors([tau[start : start + CHUNK] for tau in taus])
            block = TensorGroup(
                "w", part.experts, part.coefficients, part.base,
                offset=start, numel=taus[0].numel(), statistics={statistic: value},
            )  # fmt: skip
            parts.append(ops.largest(block, expert, statistic))
        kept = int(0.2 * taus[0].numel())
        assert torch.equal(torch.cat(parts), by_sorting(taus[expert], kept))


def test_scope_model_shares_one_budget_and_breaks_ties_in_the_order_of_names() -> None:
    groups = [
        tensors([torch.tensor([3.0, 1.0])], "a"),
        tensors([torch.tensor([1.0, 1.0, 0.5, 9.0])], "b"),
    ]
    statistic = MagnitudeThreshold(density=0.7, scope="model")  # floor(0.7 * 6) = 4 of 6 entries
    values = statistic.measure(groups)
    masks = [
        ops.largest(replace(g, statistics={statistic: values[g.name]}), 0, statistic).tolist()
        for g in groups
    ]
    assert masks == [[True, True], [True, False, False, True]]


def test_keys_sort_as_magnitudes_do() -> None:
    values = torch.tensor([0.0, -1e-40, 1e-20, -1.0, 1.0000001, 3e38])
    keys = magnitude_key(values)
    assert keys.tolist() == sorted(keys.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_tensors_keep_at_least_one(dtype: torch.dtype) -> None:
    tau = torch.tensor([0.1, -0.3, 0.2], dtype=dtype)
    mask = ops.largest(tensors([tau]), 0, MagnitudeThreshold(density=0.2))
    assert mask.tolist() == [False, True, False]


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("outliers", [None, 0.0, 0.3])
def test_sorting_a_small_tensor_gives_what_the_histograms_give(
    density: float, outliers: float | None
) -> None:
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(777, generator=generator)
    steps = (torch.randn(2, 777, generator=generator) * 4).round() / 4
    group = TensorGroup("w", tuple(base + s for s in steps), torch.ones(2), base)
    statistic = MagnitudeThreshold(density=density, outliers=outliers)
    sorted_ = statistic.measure([group])["w"]
    counted = WeightStatistic.measure(statistic, [group])["w"]
    assert sorted_.keys() == counted.keys()
    assert all(torch.equal(sorted_[key], counted[key]) for key in counted)
