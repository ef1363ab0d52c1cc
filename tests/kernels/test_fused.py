"""Fused forms against the torch forms: the same bits, for every option and both stored dtypes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import recipe_of, save

from mergewell.blocks import compute_dtype
from mergewell.kernels import base as kernels
from mergewell.methods.base import METHODS, MergeMethod
from mergewell.plan import make_plan
from mergewell.run import merge_tensors
from mergewell.statistics.base import State, WeightStatistic, joined
from mergewell.statistics.inner_products import InnerProducts
from mergewell.statistics.magnitude import MagnitudeThreshold
from mergewell.tensor_group import CHUNK, TensorGroup

SIZE = 3 * CHUNK - 20_001
DTYPES = [torch.bfloat16, torch.float32]
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("average", {}, 3),
    ("average", {"normalize": False}, 3),
    ("task_arithmetic", {"scale": 0.7, "divide": "none"}, 3),
    ("task_arithmetic", {"scale": 0.7, "divide": "count"}, 3),
    ("task_arithmetic", {"scale": 0.7, "divide": "coefficients"}, 3),
    ("task_arithmetic", {"scale": 1.0}, 1),
    *(
        ("ties", {"density": 0.3, "elect": e, "votes": v, "divide": d, "scale": 0.9}, 3)
        for e, v, d in itertools.product(
            ("mass", "count"), ("plain", "weighted"), ("usual", "count", "coefficients", "none")
        )
    ),
    ("ties", {"density": (0.1, 0.5, 1.0), "combine": "sum"}, 3),
    ("ties", {"density": 1.0}, 2),
    *(
        ("dare", {"density": 0.3, "combine": c, "rescale": r}, 3)
        for c, r in itertools.product(("sum", "agreeing"), ("density", "none"))
    ),
    ("dare", {"density": 1.0}, 2),
    ("slerp", {"t": 0.3}, 2),
]  # fmt: skip


def models(dtype: torch.dtype, experts: int) -> list[Tensor]:
    """Return a base and experts, flat, with many ties among the magnitudes and exact draws."""
    generator = torch.Generator().manual_seed(experts)
    base = torch.randn(SIZE, generator=generator)
    steps = (torch.randn(experts, SIZE, generator=generator) * 8).round() / 64
    return [base.to(dtype), *((base + step).to(dtype) for step in steps)]


def raw(tensors: list[Tensor], values: dict[WeightStatistic, Any], cut: slice) -> kernels.RawBlock:
    block = kernels.raw_block(
        "layer.weight",
        [tensor[cut] for tensor in tensors[1:]],
        tensors[0][cut],
        coefficients=[0.5 + 0.25 * k for k in range(len(tensors) - 1)],
        seed=3,
        offset=cut.start,
        numel=SIZE,
        statistics=values,
    )
    assert block is not None
    return block


def group(tensors: list[Tensor]) -> TensorGroup:
    dtype = compute_dtype([tensors[0].dtype])
    base, *experts = (tensor.to(dtype) for tensor in tensors)
    coefficients = torch.tensor([0.5 + 0.25 * k for k in range(len(experts))], dtype=dtype)
    return TensorGroup("layer.weight", tuple(experts), coefficients, base, seed=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "parameters", "experts"), CASES, ids=str)
def test_fused_merge_is_the_torch_merge_bit_for_bit(
    name: str, parameters: dict[str, Any], experts: int, dtype: torch.dtype
) -> None:
    method: MergeMethod = METHODS.build(name, parameters)
    tensors = models(dtype, experts)
    whole = group(tensors)
    values = {s: s.measure([whole])["layer.weight"] for s in method.statistics()}
    expected = method.merge(whole).to(dtype)
    parts: list[Tensor] = []
    for start in range(0, SIZE, CHUNK):
        merged = kernels.merge(method, raw(tensors, values, slice(start, start + 2 * CHUNK)))
        assert merged is not None, "no fused form"
        parts.append(kernels.as_tensor(merged)[:CHUNK])
    assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_fused_threshold_is_the_torch_threshold(scope: str, dtype: torch.dtype) -> None:
    statistic = MagnitudeThreshold(density=(0.02, 0.4), scope=scope)  # type: ignore[arg-type]
    tensors = models(dtype, 2)
    done: State = {}
    for index in range(statistic.passes):
        if not statistic.wanted(done, "layer.weight", index):
            continue
        summed: dict[str, Tensor] = {}
        for start in range(0, SIZE, CHUNK):
            block = raw(tensors, {}, slice(start, start + CHUNK))
            part = kernels.update(statistic, done, block, index)
            assert part is not None, "no fused form"
            summed = joined(summed, part)
        done = statistic.advance(done, summed, index)
    value = statistic.value(done, "layer.weight", SIZE)
    expected = statistic.measure([group(tensors)])["layer.weight"]
    assert value.keys() == expected.keys() >= {"ties_before"}
    assert all(torch.equal(value[key], expected[key]) for key in value)


def test_fused_inner_products_agree_to_rounding() -> None:
    tensors = models(torch.bfloat16, 2)
    statistic = InnerProducts(of="experts")
    state = kernels.update(statistic, {}, raw(tensors, {}, slice(0, SIZE)), 0)
    assert state is not None
    expected = statistic.measure([group(tensors)])["layer.weight"]["products"]
    found = statistic.value(state, "layer.weight", SIZE)["products"]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    values = torch.arange(-(1 << 15), 1 << 15).float() * (1 + 2**-9)
    tensors = [torch.zeros(1 << 16), values, values]
    stored = [tensor.to(dtype) for tensor in tensors]
    block = kernels.raw_block(
        "w", stored[1:], stored[0], coefficients=[1.0, 1.0], seed=0, offset=0, numel=1 << 16,
        statistics={},
    )  # fmt: skip
    assert block is not None
    merged = kernels.merge(METHODS.build("task_arithmetic", {"scale": 1 / 3}), block)
    wide = stored[1].to(compute_dtype([dtype]))
    third = torch.tensor(1 / 3, dtype=wide.dtype)
    assert merged is not None
    assert torch.equal(kernels.as_tensor(merged), (third * (wide + wide)).to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_change_sees_what_is_not_finite_and_how_far_the_rest_moved(value: float) -> None:
    old = torch.ones(40_000)
    new = old.clone()
    new[7] = 3.0
    assert kernels.change(kernels.stored(new), kernels.stored(old)) == (True, 4.0, 40_000.0)
    new[39_999] = value
    assert kernels.change(kernels.stored(new), kernels.stored(old))[0] == (value == 1e30)


def test_mixed_dtypes_and_small_blocks_have_no_fused_form() -> None:
    def of(first: Tensor, second: Tensor) -> object:
        return kernels.raw_block(
            "w", [first], second, coefficients=[1.0], seed=0, offset=0, numel=-1, statistics={}
        )

    large = torch.zeros(1 << 16)
    assert of(large, large) is not None
    assert of(large, large.bfloat16()) is None
    assert of(large.half(), large.half()) is None
    assert of(large[:9], large[:9]) is None


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties", "dare", "slerp"])
def test_merges_of_files_do_not_change_with_the_fused_forms(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = models(torch.bfloat16, 2)
    paths = [
        save(tmp_path / str(i), {"w": t, "v": t[:40_000].clone()}) for i, t in enumerate(tensors)
    ]
    plan = make_plan(recipe_of(paths[0], paths[1:], {"name": name}))
    fused = dict(merge_tensors(plan))
    monkeypatch.setattr(kernels, "merge", lambda *_: None)
    monkeypatch.setattr(kernels, "update", lambda *_: None)
    plain = dict(merge_tensors(plan))
    assert all(torch.equal(fused[key], plain[key]) for key in plain)
