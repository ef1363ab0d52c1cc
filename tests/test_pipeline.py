"""Pipelines as diffusers saves them, merged component by component."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergewell.errors import CheckpointError, OutputError, PlanError
from mergewell.pipeline import components_of, is_pipeline, merge_pipeline, plan_pipeline
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import verify_files

UNET = "diffusion_pytorch_model.safetensors"


def pipeline(folder: Path, unet: float, encoder: float) -> str:
    """Write a unet, a text encoder, a VAE that never changes, a scheduler and a tokenizer."""
    index: dict[str, Any] = {"_class_name": "P", "safety_checker": [None, None], "scale": 1.0}
    for name, file, value in [
        ("unet", UNET, unet), ("text_encoder", "model.safetensors", encoder), ("vae", UNET, 7.0),
    ]:  # fmt: skip
        index[name] = ["lib", "Class"]
        (folder / name).mkdir(parents=True)
        state = {
            "down.weight": torch.full((3, 2), 1.0 * value),
            "down.bias": torch.full((3,), 1.0 * value),
        }
        save_file(state, folder / name / file)
        (folder / name / "config.json").write_text("{}")
    for name, file in [("scheduler", "scheduler_config.json"), ("tokenizer", "vocab.json")]:
        index[name] = ["lib", "Class"]
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    values = [("base", 0, 0), ("one", 1, 4), ("two", 3, 8)]
    return [pipeline(tmp_path / name, unet, encoder) for name, unet, encoder in values]


def recipe_of(models: list[str], **more: object) -> Recipe:
    data = {"base": models[0], "experts": [{"path": path} for path in models[1:]]}
    return make_recipe({**data, "method": {"name": "task_arithmetic", "scale": 1.0}, **more})


def test_components_are_merged_or_copied(three: list[str], tmp_path: Path) -> None:
    assert is_pipeline(three[0])
    every = ("unet", "text_encoder", "vae", "scheduler", "tokenizer")
    assert components_of(three[0]) == every
    manifests = merge_pipeline(recipe_of(three), tmp_path / "out")
    assert list(manifests) == ["unet", "text_encoder"]
    out = tmp_path / "out"
    assert components_of(out) == every
    assert load_file(out / "unet" / UNET)["down.weight"].unique().tolist() == [4]
    found = load_file(out / "text_encoder" / "model.safetensors")
    assert found["down.bias"].unique().tolist() == [12]
    assert load_file(out / "vae" / UNET)["down.weight"].unique().tolist() == [7]
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    assert verify_files(out / "unet") == []
    assert not [*tmp_path.glob(".out*")]
    with pytest.raises(OutputError, match="exists already"):
        merge_pipeline(recipe_of(three), out)


def test_rules_are_for_the_components_that_they_match(three: list[str], tmp_path: Path) -> None:
    rules = [
        {"match": "unet/*.bias", "method": {"name": "average"}},
        {"match": "*.weight", "method": {"name": "keep", "model": 2}},
    ]
    merge_pipeline(recipe_of(three, rules=rules), tmp_path / "out")
    unet = load_file(tmp_path / "out" / "unet" / UNET)
    encoder = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert [unet["down.bias"][0], unet["down.weight"][0, 0]] == [2, 3]
    assert [encoder["down.bias"][0], encoder["down.weight"][0, 0]] == [12, 8]


def test_what_is_no_pipeline_is_said(three: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pipeline of several models.*text_encoder, unet"):
        open_checkpoint(three[0])
    with pytest.raises(PlanError, match="'nothing' matches no tensor of any component"):
        plan_pipeline(recipe_of(three, rules=[{"match": "nothing", "omit": True}]))
    with pytest.raises(PlanError, match="calibration is of one model"):
        plan_pipeline(recipe_of(three, calibration="c.safetensors"))
    with pytest.raises(PlanError, match=r"No component of .* differs"):
        plan_pipeline(recipe_of([three[0], three[0]]))
    lacking = pipeline(tmp_path / "lacking", 1, 1)
    index = json.loads((tmp_path / "lacking" / "model_index.json").read_text())
    (tmp_path / "lacking" / "model_index.json").write_text(json.dumps({**index, "vae": None}))
    with pytest.raises(PlanError, match="lacks vae of the pipeline"):
        plan_pipeline(recipe_of([three[0], lacking]))
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        components_of(tmp_path)


def test_a_component_alone_keeps_the_name_that_diffusers_looks_for(three: list[str]) -> None:
    recipe = recipe_of([f"{path}/unet" for path in three])
    assert [layout.file for layout in make_plan(recipe).layouts] == [UNET]


def test_nothing_stays_of_a_merge_that_fails(three: list[str], tmp_path: Path) -> None:
    state = load_file(Path(three[1]) / "text_encoder" / "model.safetensors")
    state["down.bias"][0] = torch.nan
    save_file(state, Path(three[1]) / "text_encoder" / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        merge_pipeline(recipe_of(three), tmp_path / "out")
    assert not [*tmp_path.glob(".out*")]
    assert not (tmp_path / "out").exists()
