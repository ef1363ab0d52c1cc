"""verify --deep: inputs and a sample of tensors, made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import family, save

from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import run
from mergewell.storage.manifest import hash_file
from mergewell.verify import verify_deep


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base, experts = family(tmp_path)
    recipe = {
        "base": str(base),
        "experts": [{"path": str(expert)} for expert in experts],
        "method": {"name": "dare", "density": 0.5},
        "seed": 4,
    }
    run(make_plan(make_recipe(recipe)), tmp_path / "out")
    return tmp_path / "out"


def forge(folder: Path, name: str, position: int) -> None:
    """Change one element and the manifest with it, as somebody might who wants to deceive."""
    file = folder / "model.safetensors"
    state = load_file(file)
    state[name].view(-1)[position] += 1
    save_file(state, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["outputs"][0] |= {"hash": hash_file(file), "bytes": file.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_sound_folder_has_no_problem(merged: Path) -> None:
    assert verify_deep(merged) == []


def test_a_forged_element_is_found_where_hashes_are_silent(merged: Path) -> None:
    forge(merged, "layer.0.weight", 77)
    (problem,) = verify_deep(merged)
    assert problem.startswith("layer.0.weight differs") and "in 1 of 150000 elements" in problem
    found = [verify_deep(merged, sample=1, seed=seed) for seed in range(12)]
    assert [] in found and [problem] in found, "a sample of one of six tensors"


def test_a_changed_or_missing_input_is_named_first(merged: Path, tmp_path: Path) -> None:
    expert = tmp_path / "expert1"
    state = load_file(expert / "model.safetensors")
    state["scale"] += 1
    save(expert, state)
    (problem,) = verify_deep(merged)
    assert "expert1/model.safetensors changed" in problem
    (expert / "model.safetensors").unlink()
    (problem,) = verify_deep(merged)
    assert "expert1/model.safetensors is gone" in problem


def test_relative_paths_are_those_of_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(tmp_path / "models", experts=1)
    monkeypatch.chdir(tmp_path / "models")
    recipe = {"base": "base", "experts": [{"path": "expert0"}], "method": {"name": "average"}}
    run(make_plan(make_recipe(recipe)), "out")
    monkeypatch.chdir(tmp_path)
    assert verify_deep("models/out") == []


def test_another_dtype_is_named(merged: Path) -> None:
    file = merged / "model.safetensors"
    state = load_file(file)
    save_file({**state, "scale": state["scale"].to(torch.float32)}, file)
    manifest = json.loads((merged / "manifest.json").read_text())
    manifest["outputs"][0] |= {"hash": hash_file(file), "bytes": file.stat().st_size}
    (merged / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify_deep(merged)
    assert problem.startswith("scale is torch.float32 []")
