"""Fused forms against the torch forms: the same bits, for every option and both stored dtypes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import recipe_of, save

from mergewell.blocks import compute_dtype
from mergewell.kernels import base as kernels
from mergewell.kernels import rank_ops, thresholds
from mergewell.methods.base import METHODS, MergeMethod
from mergewell.plan import make_plan
from mergewell.run import merge_tensors
from mergewell.statistics.base import State, WeightStatistic, joined
from mergewell.statistics.inner_products import InnerProducts
from mergewell.statistics.kept_norm import KeptNorm
from mergewell.statistics.magnitude import MagnitudeThreshold
from mergewell.statistics.selected_energy import SelectedEnergy
from mergewell.tensor_group import CHUNK, TensorGroup

SIZE = 2 * CHUNK - 20_001
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
    *(("ties", {"density": 0.3, "votes": v}, k) for v in ("plain", "weighted") for k in (1, 4, 5)),
    *(
        ("dare", {"density": 0.3, "combine": c, "rescale": r}, 3)
        for c, r in itertools.product(("sum", "agreeing"), ("density", "norm", "none"))
    ),
    ("dare", {"density": 1.0}, 2),
    *(
        ("breadcrumbs", {"density": d, "gamma": g, "combine": c}, 3)
        for d, g, c in (
            (0.2, 0.01, "sum"), (0.3, 0.1, "agreeing"), ((0.1, 0.3, 0.9), (0.0, 0.2, 0.5), "sum"),
        )
    ),
    *(("sce", {"density": 0.2, "scale": 0.7}, k) for k in (1, 3, 5)),
    *(("sce", {"density": d, "scale": 0.7}, k) for d, k in ((1.0, 2), (0.5, 4))),
    ("slerp", {"t": 0.3}, 2),
    *(("model_stock", {}, k) for k in (1, 3, 5)),
    ("metagpt", {"scope": "tensor"}, 3),
]  # fmt: skip


def models(dtype: torch.dtype, experts: int) -> list[Tensor]:
    """Return a base and experts, flat, with many ties among the magnitudes and exact draws."""
    generator = torch.Generator().manual_seed(experts)
    base = torch.randn(SIZE, generator=generator)
    steps = (torch.randn(experts, SIZE, generator=generator) * 8).round() / 64
    return [base.to(dtype), *((base + step).to(dtype) for step in steps)]


def raw(
    tensors: list[Tensor],
    values: dict[WeightStatistic, Any],
    cut: slice,
    name: str = "layer.weight",
) -> kernels.RawBlock:
    block = kernels.raw_block(
        name,
        [tensor[cut] for tensor in tensors[1:]],
        tensors[0][cut],
        coefficients=[0.5 + 0.25 * k for k in range(len(tensors) - 1)],
        seed=3,
        offset=cut.start,
        numel=tensors[0].numel(),
        statistics=values,
    )
    assert block is not None
    return block


def group(tensors: list[Tensor], name: str = "layer.weight") -> TensorGroup:
    dtype = compute_dtype([tensors[0].dtype])
    base, *experts = (tensor.to(dtype) for tensor in tensors)
    coefficients = torch.tensor([0.5 + 0.25 * k for k in range(len(experts))], dtype=dtype)
    return TensorGroup(name, tuple(experts), coefficients, base, seed=3)


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
        assert merged.finite
        parts.append(kernels.as_tensor(merged.out)[:CHUNK])
    assert torch.equal(torch.cat(parts), expected)


def carried_out(statistic: WeightStatistic, named: dict[str, list[Tensor]], size: int) -> Any:
    """Return each tensor's value by the fused form, from blocks of `size`, and the passes taken."""
    program = kernels.program(statistic)
    assert program is not None, "no fused form"
    done: State = {}
    taken: list[int] = []
    for index in range(program.passes):
        wanted = [name for name in named if program.wanted(done, name, index)]
        summed: dict[str, Tensor] = {}
        for name in wanted:
            for start in range(0, named[name][0].numel(), size):
                block = raw(named[name], {}, slice(start, start + size), name)
                summed = joined(summed, program.update(done, block, index))
        done = program.advance(done, summed, index)
        taken += [index] if wanted else []
    return {n: program.value(done, n, t[0].numel()) for n, t in named.items()}, taken


def assert_same_selection(value: Any, expected: Any) -> None:
    """Check keys, and how many ties may be taken wherever ties are cut at all."""
    assert torch.equal(value["key"], expected["key"])
    assert ("ties_before" in value) == ("ties_before" in expected)
    if "ties_before" in value:
        assert torch.equal(value["ties_kept"], expected["ties_kept"])
        known = value["ties_before"][:, -1] > 0
        assert known.any()
        assert torch.equal(value["ties_before"][known], expected["ties_before"][known])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("outliers", [None, (0.01, 0.3)])
def test_fused_threshold_is_the_torch_threshold(
    scope: str, dtype: torch.dtype, outliers: Any
) -> None:
    statistic = MagnitudeThreshold(density=(0.02, 0.4), scope=scope, outliers=outliers)  # type: ignore[arg-type]
    tensors = models(dtype, 2)
    named = {"a.weight": tensors, "b.weight": [t[:70_000].flip(0) for t in tensors]}
    values, _ = carried_out(statistic, named, CHUNK)
    expected = statistic.measure([group(t, name) for name, t in named.items()])
    for name in named:
        assert_same_selection(values[name], expected[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0001, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["spread", "one far block", "nearly all zero", "two values"])
def test_ranks_are_exact_whatever_the_sample_says(
    kind: str, density: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(SIZE, generator=generator)
    step = torch.randn(SIZE, generator=generator) * 1e-3
    if kind == "one far block":  # what the sample sees of it is far too little, or too much
        step[1000:1030] *= 1000
        step[SIZE // 2 :] *= 1e-6
    if kind == "nearly all zero":
        step[torch.rand(SIZE, generator=generator) < 0.995] = 0
    if kind == "two values":
        step = torch.where(step > 0, 0.25, 0.5)
        base = torch.zeros(SIZE)
    tensors = [base.to(dtype), (base + step).to(dtype)]
    statistic = MagnitudeThreshold(density=density)
    values, taken = carried_out(statistic, {"layer.weight": tensors}, 2 * CHUNK)
    assert_same_selection(
        values["layer.weight"], statistic.measure([group(tensors)])["layer.weight"]
    )
    assert len(taken) <= 7


def test_a_bfloat16_fine_tune_takes_one_pass_of_counting() -> None:
    generator = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(SIZE, generator=generator)).bfloat16()
    expert = (base + 1e-3 * torch.randn(SIZE, generator=generator)).bfloat16()
    _, taken = carried_out(MagnitudeThreshold(density=0.2), {"w": [base, expert]}, CHUNK)
    assert taken == [0, 1]


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_bracket_with_too_many_entries_is_counted_by_halves(
    scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistic = MagnitudeThreshold(density=0.2, scope=scope)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(SIZE, generator=generator)
    named = {"w": [base, base + 1e-3 * torch.randn(SIZE, generator=generator)]}
    expected, taken = carried_out(statistic, named, CHUNK)
    if scope == "tensor":  # all of the bracket is held
        assert taken == [0, 1]
    monkeypatch.setattr(thresholds, "_HELD", 1)
    values, taken = carried_out(statistic, named, CHUNK)
    assert taken[:4] == [0, 1, 2, 3]
    assert torch.equal(values["w"]["key"], expected["w"]["key"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.2, 0.9, 1.0])
def test_fused_energy_is_the_torch_energy(density: float, dtype: torch.dtype) -> None:
    tensors = models(dtype, 3)
    tensors[2][:50_000] = tensors[1][:50_000] = tensors[3][:50_000]  # no variance here
    statistic = SelectedEnergy(density=density)
    values, _ = carried_out(statistic, {"layer.weight": tensors}, CHUNK)
    expected = statistic.measure([group(tensors)])["layer.weight"]
    value = values["layer.weight"]
    torch.testing.assert_close(value["energy"], expected["energy"], rtol=1e-12, atol=0)
    if density < 1:
        assert_same_selection(value, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_norms_are_the_torch_norms(dtype: torch.dtype) -> None:
    tensors, statistic = models(dtype, 3), KeptNorm(density=(0.2, 0.7, 1.0))
    values, _ = carried_out(statistic, {"layer.weight": tensors}, CHUNK)
    expected = statistic.measure([group(tensors)])["layer.weight"]
    for name in ("whole", "kept"):
        torch.testing.assert_close(values["layer.weight"][name], expected[name], rtol=1e-13, atol=0)


@pytest.mark.parametrize("of", ["experts", "task_vectors"])
@pytest.mark.parametrize("experts", [1, 2, 3, 5])
def test_fused_inner_products_agree_to_rounding(experts: int, of: Any) -> None:
    tensors = models(torch.bfloat16, experts)
    statistic = InnerProducts(of=of)
    values, _ = carried_out(statistic, {"layer.weight": tensors}, CHUNK)
    expected = statistic.measure([group(tensors)])["layer.weight"]["products"]
    found = values["layer.weight"]["products"]
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
    assert torch.equal(kernels.as_tensor(merged.out), (third * (wide + wide)).to(dtype))


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties", "dare", "breadcrumbs"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.bfloat16),
        (-float("inf"), torch.bfloat16),
        (1e30, torch.bfloat16),
        (float("nan"), torch.float32),
    ],
    ids=str,
)
def test_what_is_not_finite_is_seen_in_every_model(
    name: str, value: float, dtype: torch.dtype
) -> None:
    method = METHODS.build(name, {"density": 0.5} if name in ("ties", "breadcrumbs") else {})
    for spoiled in range(3):
        tensors = [tensor.clone() for tensor in models(dtype, 2)]
        tensors[spoiled][SIZE - 7] = value
        made = {s: s.measure([group(tensors)])["layer.weight"] for s in method.statistics()}
        merged = kernels.merge(method, raw(tensors, made, slice(CHUNK // 2, SIZE)))
        assert merged is not None
        assert merged.finite == (value == 1e30)
    tensors = models(dtype, 2)
    made = {s: s.measure([group(tensors)])["layer.weight"] for s in method.statistics()}
    merged = kernels.merge(method, raw(tensors, made, slice(CHUNK // 2, SIZE)))
    assert merged is not None
    assert merged.finite


def test_the_tally_is_the_distance_from_the_reference() -> None:
    old = torch.ones(40_000)
    new = old.clone()
    new[7] = 3.0
    block = kernels.raw_block(
        "w", [new], old, coefficients=[1.0], seed=0, offset=0, numel=40_000, statistics={}
    )
    assert block is not None
    merged = kernels.merge(METHODS.build("average", {}), block)
    assert merged is not None
    assert (merged.changed, merged.moved, merged.original) == (True, 4.0, 40_000.0)
    same = kernels.merge(METHODS.build("task_arithmetic", {"scale": 0.0}), block)
    assert same is not None
    assert (same.changed, same.moved) == (False, 0.0)


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


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties", "dare", "slerp", "sce"])
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
    monkeypatch.setattr(kernels, "program", lambda *_: None)
    plain = dict(merge_tensors(plan))
    assert all(torch.equal(fused[key], plain[key]) for key in plain)


@pytest.mark.parametrize("length", [1, 300, 4864])
@pytest.mark.parametrize("kind", ["spread", "ties", "one value", "one binade", "zeros"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"density": 0.5, "epsilon": 0.15},
        {"density": 0.3, "epsilon": 0.0, "combine": "sum", "rescale": "none"},
        {"density": (1.0, 0.4, 0.6), "epsilon": (0.1, 0.2, 0.05)},
    ],
)
def test_fused_ranks_are_the_torch_ranks(
    parameters: dict[str, Any], kind: str, length: int
) -> None:
    rows = max(3, (1 << 15) // length + 1)
    generator = torch.Generator().manual_seed(length)
    base = torch.randn(rows, length, generator=generator)
    steps = torch.randn(3, rows, length, generator=generator) * 0.1
    if kind == "ties":
        steps = (steps * 40).round() / 40
    if kind == "one value":
        steps = torch.full_like(steps, 0.5)
        base = torch.zeros_like(base)
    if kind == "one binade":
        base, steps = torch.zeros_like(base), 1 + torch.rand(steps.shape, generator=generator) / 64
    if kind == "zeros":
        steps = steps * (torch.rand(steps.shape, generator=generator) < 0.1)
    tensors = [base.bfloat16(), *((base + step).bfloat16() for step in steps)]
    method = METHODS.build("della", parameters)
    expected = method.merge(group(tensors)).bfloat16()
    parts: list[Tensor] = []
    for start in range(0, rows, 2):
        own, *others = (tensor[start : start + 2] for tensor in tensors)
        block = kernels.raw_block(
            "layer.weight", others, own,
            coefficients=[0.5, 0.75, 1.0], seed=3, offset=start * length, numel=rows * length,
            statistics={}, row=length,
        )  # fmt: skip
        assert block is not None
        merged = kernels.merge(method, block)
        assert merged is not None, "no fused form"
        parts.append(kernels.as_tensor(merged.out).clone())
        if start > 40:
            break
    found = torch.cat(parts)
    assert torch.equal(found, expected.flatten()[: found.numel()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_rows_are_pulled_as_the_torch_form_does(experts: int, dtype: torch.dtype) -> None:
    rows, length = 111, 700
    generator = torch.Generator().manual_seed(experts)
    base = torch.randn(rows, length, generator=generator)
    shared = torch.randn(rows, length, generator=generator) / 50
    steps = shared + torch.randn(experts, rows, length, generator=generator) / 40
    steps[:, 5] = 0
    base[6], steps[:, 6] = 0, 1
    steps[0, 6] = -1  # of two experts, one is the other's opposite
    tensors = [base.to(dtype), *((base + step).to(dtype) for step in steps)]
    method = METHODS.build("model_stock", {"scope": "row"})
    expected = method.merge(group(tensors)).to(dtype).flatten()
    for first, last in ((0, 50), (50, rows)):
        own, *others = (tensor[first:last] for tensor in tensors)
        block = kernels.raw_block(
            "layer.weight", others, own, coefficients=[0.25] * experts, seed=3,
            offset=first * length, numel=rows * length, statistics={}, row=length,
        )  # fmt: skip
        assert block is not None
        merged = kernels.merge(method, block)
        assert merged is not None, "no fused form"
        assert merged.finite
        assert merged.changed
        found = kernels.as_tensor(merged.out)
        assert torch.equal(found, expected[first * length : last * length])


@pytest.mark.parametrize(
    ("kind", "counted"),
    [("few", True), ("zeros", True), ("few odd", True), ("odd alike", True), ("one odd", False),
     ("many odd", False), ("far", False)],
)  # fmt: skip
def test_places_in_a_row_are_those_of_a_stable_sort(kind: str, counted: bool) -> None:
    generator = np.random.default_rng(3)
    size = 4999
    keys = (0x3A00 + generator.integers(0, 90, size)).astype(np.int32) << 16
    keys[generator.random(size) < 0.2] = 0
    odd = (generator.random(size) < (0.5 if kind == "many odd" else 0.02)) & (keys > 0)
    if "odd" in kind:
        keys[odd] += generator.integers(1, 1 << 16, odd.sum()).astype(np.int32)
    if kind == "zeros":
        keys[:] = 0
    if kind == "odd alike":
        keys[odd] = 0x3A007777
    if kind == "one odd":
        keys[:] = 0x3A007777
    if kind == "far":
        keys[7] = 0x7F000000
    expected = np.empty(size, np.int64)
    expected[np.argsort(keys, kind="stable")] = np.arange(size)
    table = np.arange(size, dtype=np.float32)
    places, spare = np.zeros(size, np.float32), np.zeros((4, size + rank_ops.BINS), np.int32)
    assert rank_ops.by_counting(keys, table, places, spare) == counted
    if counted:
        assert np.array_equal(places, expected)
    rank_ops.by_rank(keys, table, places, spare)
    assert np.array_equal(places, expected)
