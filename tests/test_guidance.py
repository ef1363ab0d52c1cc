"""A calibration in a recipe: which tensors it guides, with what, and when it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import save

from mergewell.calibration.models import merge_digest
from mergewell.errors import CheckpointError, DataError, PlanError
from mergewell.guidance import model_digest, open_guidance
from mergewell.jobs import run_shard
from mergewell.plan import Plan, make_plan
from mergewell.recipe import make_recipe, read_recipe
from mergewell.run import merge_tensors, run
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import hash_file
from mergewell.verify import verify_deep

SHAPES = {
    "net.layers.0.up": (6, 4),
    "net.layers.1.up": (5, 4),
    "net.layers.1.gates": (8, 4),
    "net.layers.1.turned": (4, 6),
    "net.layers.1.half": (6, 4),
    "net.bias": (6,),
}


def unit(name: str, nodes: int, *rows: tuple[str, int, int, int]) -> dict[str, Any]:
    keys = ("parameter", "dim", "start", "step")
    return {
        "name": name,
        "nodes": nodes,
        "branches": [{"rows": dict(zip(keys, row, strict=True))} for row in rows],
    }


UNITS = [
    unit("a", 6, ("layers.0.up", 0, 0, 1)),
    unit("b", 5, ("layers.1.up", 0, 0, 1)),
    unit("c", 4, ("layers.1.gates", 0, 1, 2), ("layers.1.gates", 0, 0, 2)),
    unit("d", 6, ("layers.1.turned", 1, 0, 1)),
    unit("e", 3, ("layers.1.half", 0, 3, 1)),
]
NODE = {
    "a": [5.0, 1.0, 3.0, 2.0, 4.0, 0.0],
    "b": [0.1] * 5,
    "c": [4.0, 3.0, 2.0, 1.0],
    "d": [1.0] * 6,
    "e": [1.0] * 3,
}


def models(folder: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    made = [
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(3)
    ]
    names = ("base", "one", "two")
    return [save(folder / n, s, torch.float32) for n, s in zip(names, made, strict=True)]


def calibration(path: Path, of: list[Path], **changes: Any) -> Path:
    names = ["base", "expert 1", "expert 2"]
    known = [
        {"name": name, "path": str(p), "digest": model_digest(open_checkpoint(p))}
        for name, p in zip(names, of, strict=False)
    ]
    about = {
        "version": 1,
        "models": [*known, {"name": "merged", "path": "", "digest": "?"}],
        "units": UNITS,
        "done": [0],
        "batches": 2,
        **changes,
    }
    save_file(states(), path, {"mergewell.calibration": json.dumps(about)})
    return path


def states() -> dict[str, Tensor]:
    """Return states of two observations with the node M-Loss of `NODE`."""
    made: dict[str, Tensor] = {}
    for name, values in NODE.items():
        node = torch.tensor(values, dtype=torch.float64)
        one, two = torch.ones_like(node), torch.tensor(2.0, dtype=torch.float64)
        parts = {"gap": node, "gap_squared": 2 * node, "ensemble_squared": one, "gap_norm": two}
        parts |= {"observations": two, "samples": two}
        made |= {f"m_loss/{name}/{key}": part.clone() for key, part in parts.items()}
    return made


def planned(
    of: list[Path], calibrated: Path | None, method: Mapping[str, Any] | None = None, **more: Any
) -> Plan:
    data = {"base": str(of[0]), "experts": [{"path": str(p)} for p in of[1:]], **more}
    if calibrated is not None:
        data["calibration"] = str(calibrated)
    return make_plan(make_recipe({**data, "method": method or {"name": "m_ties"}}))


@pytest.fixture
def of(tmp_path: Path) -> list[Path]:
    return models(tmp_path)


@pytest.fixture
def calibrated(of: list[Path], tmp_path: Path) -> Path:
    return calibration(tmp_path / "c.safetensors", of)


def test_nodes_are_laid_on_the_rows_of_their_parameters(of: list[Path], calibrated: Path) -> None:
    guidance = open_guidance(calibrated, [open_checkpoint(path) for path in of])
    assert list(guidance.tensors) == ["net.layers.0.up", "net.layers.1.up", "net.layers.1.gates"]
    up = guidance.values("net.layers.0.up", ["m_loss"])
    assert up["m_loss"].tolist() == NODE["a"]
    assert up["m_loss_rank"].tolist() == [1.0, 0.2, 0.6, 0.4, 0.8, 0.0]
    assert guidance.values("net.layers.0.up", ["m_loss"], 2, 4)["m_loss"].tolist() == [3.0, 2.0]
    gates = guidance.values("net.layers.1.gates", ["m_loss"])["m_loss"]
    assert gates.tolist() == [4, 4, 3, 3, 2, 2, 1, 1]  # both branches of a gated unit
    equal = guidance.values("net.layers.1.up", ["m_loss"])["m_loss_rank"]
    assert equal.tolist() == [0, 0.25, 0.5, 0.75, 1]  # equal ones from the front
    # relative M-Loss: a 15 / 3, b 0.5 / 2.5, c 10 / 2 (roots left out); ties in order
    places = [
        float(guidance.values(name, ["m_loss"])["m_loss_layer_rank"]) for name in guidance.tensors
    ]
    assert places == [0.5, 0.0, 1.0]


def test_the_plan_says_what_is_guided(of: list[Path], calibrated: Path) -> None:
    plan = planned(of, calibrated, {"name": "m_ties", "layers": [1], "density": 0.5})
    tensors = {tensor["name"]: tensor for tensor in plan.as_data(1)["tensors"]}
    guided = [name for name, tensor in tensors.items() if tensor["calibration"]]
    assert sorted(guided) == ["net.layers.1.gates", "net.layers.1.up"]
    assert tensors["net.bias"]["parameters"]["budget"] == "none"
    (warning,) = plan.warnings
    assert warning.startswith(f"2 of 6 tensors are guided by {calibrated} (which saw 1 of 2 batch")
    assert "net.layers.1.turned is not: its nodes stand along dimension 1" in warning
    assert "net.layers.1.half is not: only some of its rows were measured" in warning


def test_blocks_and_the_whole_are_the_same(of: list[Path], calibrated: Path) -> None:
    for budget in ("neutral", "layer_aware", "random", "reversed"):
        method = {"name": "m_ties", "budget": budget, "density": 0.5, "spread": 0.5}
        plan = planned(of, calibrated, method)
        whole, cut = dict(merge_tensors(plan)), dict(merge_tensors(plan, block=8))
        assert all(torch.equal(whole[name], cut[name]) for name in SHAPES)


def test_values_reach_the_method(of: list[Path], calibrated: Path) -> None:
    method = {"name": "m_ties", "density": 0.5, "spread": 1.0}
    merged = dict(merge_tensors(planned(of, calibrated, method)))["net.layers.0.up"]
    base = open_checkpoint(of[0])["net.layers.0.up"]
    assert torch.equal(merged[0], base[0])  # the largest M-Loss keeps nothing
    assert bool((merged[5] != base[5]).all())  # the smallest keeps all


def test_the_file_stands_in_the_result_and_in_what_is_resumed(
    of: list[Path], calibrated: Path, tmp_path: Path
) -> None:
    plan = planned(of, calibrated)
    run(plan, tmp_path / "out")
    assert plan.guidance is not None
    metadata = open_checkpoint(tmp_path / "out").weight_files()[0].metadata
    assert metadata["mergewell.calibration"] == plan.guidance.digest
    key = plan.resume_key()
    calibration(calibrated, of, done=[0, 1])
    again = planned(of, calibrated)
    assert again.resume_key() != key and "batches" not in again.warnings[0]


def test_the_calibration_is_an_input_of_the_merge(
    of: list[Path], calibrated: Path, tmp_path: Path
) -> None:
    plan = planned(of, calibrated)
    for algorithm in ("xxh3-128", "sha256"):
        manifest = run(plan, tmp_path / algorithm, algorithm=algorithm)
        (record,) = [file for file in manifest.inputs if file.path == str(calibrated)]
        assert record.hash == hash_file(calibrated, algorithm)
        assert record.bytes == calibrated.stat().st_size
        assert len(manifest.inputs) == 4
    assert verify_deep(tmp_path / "sha256").problems == ()
    run_shard(plan, tmp_path / "jobs", 0, 1)
    assert run_shard(plan, tmp_path / "jobs", 0, 1).missing == (), "the result is known again"
    calibration(calibrated, of, done=[0, 1])
    (problem,) = verify_deep(tmp_path / "sha256").problems
    assert "c.safetensors" in problem


def test_what_a_plan_does_is_told_by_the_calibration_and_not_by_its_path(
    of: list[Path], calibrated: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(calibrated.read_bytes())
    assert merge_digest(planned(of, moved)) == merge_digest(planned(of, calibrated))
    before = merge_digest(planned(of, calibrated))
    calibration(calibrated, of, done=[0, 1])
    assert merge_digest(planned(of, calibrated)) != before


def test_a_path_in_a_recipe_file_is_seen_from_there(of: list[Path], calibrated: Path) -> None:
    text = "base: base\nexperts: [{path: one}, {path: two}]\ncalibration: c.safetensors\n"
    file = calibrated.parent / "r.yaml"
    file.write_text(text + "method: {name: m_dare}\n")
    recipe = read_recipe(file)
    assert recipe.calibration == str(calibrated)
    assert make_plan(recipe).guidance is not None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda of, c: planned([of[0], of[2], of[1]], c), PlanError, "two is not the expert 1"),
        (lambda of, c: planned([of[1], of[1], of[2]], c), PlanError, "one is not the base"),
        (lambda of, c: planned(of[:2], c), PlanError, "of 2 experts and 1 are merged"),
        (lambda of, c: planned(of, None), PlanError, "m_ties is guided by a calibration; make"),
        (lambda of, c: planned(of, c, {"name": "ties"}), PlanError, "guides no tensor"),
        (lambda of, c: planned(of, of[0] / "model.safetensors"), DataError, "is no calibration"),
        (lambda of, c: planned(of, c.parent / "no"), CheckpointError, "no"),
    ],
)
def test_what_does_not_fit_is_refused(
    of: list[Path],
    calibrated: Path,
    change: Callable[[list[Path], Path], object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        change(of, calibrated)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": 2}, DataError, "of version 2"),
        ({"units": [{"name": "a"}]}, CheckpointError, "header cannot be read"),
        ({"units": [unit("a", 7, ("layers.0.up", 0, 0, 1))]}, PlanError, "measured 7 rows of net"),
        ({"units": [unit("a", 6, ("elsewhere", 0, 0, 1))]}, PlanError, "measured elsewhere, which"),
    ],
)
def test_what_is_damaged_is_named(
    of: list[Path], tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = calibration(tmp_path / "d.safetensors", of, **changes)
    with pytest.raises(error, match=message):
        planned(of, path)


def test_states_are_checked_when_they_are_read(of: list[Path], calibrated: Path) -> None:
    metadata = open_guidance(calibrated, [open_checkpoint(p) for p in of]).file.metadata
    for damage, message in [
        (
            {"m_loss/a/gap_squared": torch.full((6,), torch.nan)},
            "the M-Loss of a is not one finite",
        ),
        ({"m_loss/a/gap_squared": torch.ones(5)}, "the M-Loss of a is not one finite"),
        ({"m_loss/a/gap_squared": None}, "m_loss/a/gap_squared is missing"),
    ]:
        kept = {**load_file(calibrated), **damage}
        path = calibrated.parent / "damaged.safetensors"
        save_file({k: v for k, v in kept.items() if v is not None}, path, dict(metadata))
        with pytest.raises(CheckpointError, match=message):
            dict(merge_tensors(planned(of, path)))
