"""Which tensors' subspaces are measured, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import recipe_of, save

import mergewell.diagnostics.ops as ops
from mergewell.diagnostics.ops import (
    cosines_of,
    distances_of,
    measure_matrices,
    measure_task_vectors,
    measure_top_conflicts,
    pair_values,
)
from mergewell.plan import Plan, make_plan
from mergewell.run import measure_weights
from mergewell.statistics.inner_products import InnerProducts
from mergewell.statistics.subspaces import cost, measure_subspaces
from mergewell.statistics.top_conflict import TopConflict

SHAPES = {
    "embed.weight": (30, 8),
    "layer.weight": (16, 12),
    "layer.bias": (16,),
    "conv.weight": (8, 3, 2, 2),
    "still.weight": (6, 6),
    "signal.weight": (4, 3, 5),
    "lm_head.weight": (30, 8),
    "encoder.header.weight": (4, 4),
}


def plan(folder: Path, **more: object) -> Plan:
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    base["table"] = torch.arange(6).view(2, 3)
    paths = [save(folder / "base", base, torch.float32)]
    for index in range(2):
        moved = {
            n: t
            if n in ("table", "still.weight")
            else t + torch.randn(t.shape, generator=generator)
            for n, t in base.items()
        }
        paths.append(save(folder / f"e{index}", moved, torch.float32))
    recipe = recipe_of(paths[0], paths[1:], {"name": "task_arithmetic"}, **more)
    return make_plan(recipe)


def test_matrices_are_measured_and_the_rest_is_named(tmp_path: Path) -> None:
    found = measure_matrices(plan(tmp_path))
    assert list(found.measured) == ["conv.weight", "encoder.header.weight", "layer.weight"]
    assert found.unmeasured == {
        "embed.weight": "an embedding or a head by its name",
        "lm_head.weight": "an embedding or a head by its name",
        "signal.weight": "3 dimensions: neither a matrix nor a kernel of an image",
        "still.weight": "no expert moved it",
    }


def test_each_is_measured_on_the_whole_matrix_with_its_coefficients(tmp_path: Path) -> None:
    made = plan(tmp_path)
    found = measure_matrices(made)
    for name in ("layer.weight", "conv.weight"):
        base = made.reference.read(name).double()
        shape = (SHAPES[name][0], -1)
        tasks = [(e.read(name).double() - base).view(shape) for e in made.experts]
        expected = measure_subspaces(tasks, made.tasks[name].coefficients)
        assert torch.equal(found.measured[name].alignment, expected.alignment)
        assert found.measured[name].interference == expected.interference


def test_what_is_copied_is_not_measured(tmp_path: Path) -> None:
    rule = {"match": "layer.weight", "method": {"name": "keep", "model": 0}}
    found = measure_matrices(plan(tmp_path, rules=[rule]))
    assert found.unmeasured["layer.weight"] == "copied by a rule and not merged"


def test_the_budget_is_kept_and_what_it_leaves_out_is_named(tmp_path: Path) -> None:
    made = plan(tmp_path)
    budget = cost((4, 4), 2) + cost((6, 6), 2) + cost((8, 12), 2)
    seen: list[tuple[int, int]] = []
    found = measure_matrices(made, budget=budget, on_progress=lambda *a: seen.append(a))
    assert "over the budget" in found.unmeasured["layer.weight"]
    assert sorted(found.measured) == ["conv.weight", "encoder.header.weight"]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert measure_matrices(made, budget=0).measured == {}


def test_the_budget_is_for_all_matrices_together(tmp_path: Path) -> None:
    made = plan(tmp_path)
    sizes = {"conv.weight": (8, 12), "encoder.header.weight": (4, 4), "layer.weight": (16, 12)}
    prices = {name: cost(shape, 2) for name, shape in sizes.items()}
    budget = max(prices.values()) * 1.01
    found = measure_matrices(made, budget=budget)
    assert 0 < sum(prices[name] for name in found.measured) <= budget
    assert len(found.measured) < 3 and "over the budget" in str(found.unmeasured)


def test_other_names_can_be_excluded(tmp_path: Path) -> None:
    found = measure_matrices(plan(tmp_path), excluded="^layer")
    assert "layer.weight" in found.unmeasured and "embed.weight" in found.measured


def test_cosines_and_distances_of_inner_products() -> None:
    products = torch.tensor([[4.0, -2.0, 0.0], [-2.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert cosines_of(products)[0, 1] == -0.5
    assert pair_values(cosines_of(products)) == [-0.5, -0.5]
    assert distances_of(products)[0].tolist() == [0, pytest.approx(12**0.5), 2]


@pytest.mark.parametrize("read", [ops._READ, 64])
def test_every_weight_is_in_the_sums_once(
    tmp_path: Path, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_READ", read)
    monkeypatch.setattr(ops, "CHUNK", min(read, 32))
    made = plan(tmp_path, rules=[{"match": "layer.bias", "method": {"name": "keep", "model": 0}}])
    seen: list[int] = []
    found = measure_task_vectors(made, on_progress=seen.append)
    assert found.keys() == SHAPES.keys() - {"layer.bias"}
    assert sum(seen) == sum(made.tasks[name].spec.nbytes for name in found)
    products = measure_weights(made, [InnerProducts()])
    for name, sums in found.items():
        wanted = next(iter(products[name].values()))["products"]
        torch.testing.assert_close(sums.products[1:, 1:], wanted, rtol=1e-5, atol=1e-5)
        base = made.reference.read(name).double()
        assert float(sums.products[0, 0]) == pytest.approx(float(base @ base), rel=1e-6)
        moved = [float((expert.read(name).double() - base).sum()) for expert in made.experts]
        assert sums.sums.tolist() == pytest.approx(moved, rel=1e-4)
    assert not found["still.weight"].mass.any()


@pytest.mark.parametrize("whole", [ops._WHOLE, 100])
def test_large_tensors_are_ranked_in_passes_and_the_rest_at_once(
    tmp_path: Path, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_WHOLE", whole)
    made = plan(tmp_path)
    seen: list[int] = []
    found = measure_top_conflicts(made, on_progress=seen.append)
    wanted = measure_weights(made, [TopConflict()])
    assert list(found) == list(wanted)
    assert sum(seen) == sum(made.tasks[name].spec.nbytes for name in found)
    for name, value in wanted.items():
        assert torch.equal(found[name], value[TopConflict()]["conflicts"]), name
