"""Stages: a recipe's result as a model of another, and adapters on models of their own."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from toys import family, save

from mergewell.errors import PlanError, RecipeError
from mergewell.opening import open_model
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe, read_recipe
from mergewell.run import merge_tensors, run
from mergewell.stages import StageCheckpoint
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import read_manifest, verify_files

WEIGHT = "layer.0.weight"


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A base and three experts, by name; temporary folders lie in a place of their own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    base, experts = family(tmp_path / "toys")
    return {"base": str(base), **{f"e{i}": str(path) for i, path in enumerate(experts)}}


def staged(toys: dict[str, str]) -> dict[str, Any]:
    """Return a recipe of a global TIES of two experts, merged with the third."""
    half = {
        "base": toys["base"],
        "experts": [{"path": toys["e0"]}, {"path": toys["e1"]}],
        "method": {"name": "ties", "density": 0.5, "trim_scope": "model"},
    }
    last = {"base": toys["base"], "experts": [{"path": "half"}, {"path": toys["e2"]}]}
    return {**last, "method": {"name": "task_arithmetic"}, "stages": {"half": half}}


def test_a_stage_is_the_merge_before(toys: dict[str, str], tmp_path: Path) -> None:
    data = staged(toys)
    run(make_plan(make_recipe(data)), tmp_path / "out")
    run(make_plan(make_recipe(data["stages"]["half"])), tmp_path / "half")
    data["experts"][0]["path"] = str(tmp_path / "half")
    del data["stages"]
    run(make_plan(make_recipe(data)), tmp_path / "twice")
    with open_checkpoint(tmp_path / "out") as one, open_checkpoint(tmp_path / "twice") as two:
        assert all(torch.equal(one[name], two[name]) for name in two)
    manifest = read_manifest(tmp_path / "out")
    named = {Path(file.path).parent.name for file in manifest.inputs}
    assert named == {"base", "expert0", "expert1", "expert2"}
    assert verify_files(tmp_path / "out") == []
    again = read_recipe(tmp_path / "out" / "manifest.json")
    assert again.stages["half"].method.name == "ties"


def test_nothing_is_merged_by_planning_and_nothing_stays(
    toys: dict[str, str], tmp_path: Path
) -> None:
    plan = make_plan(make_recipe(staged(toys)))
    assert [*(tmp_path / "tmp").iterdir()] == []
    stage = plan.experts[0]
    assert isinstance(stage, StageCheckpoint)
    copy: StageCheckpoint = pickle.loads(pickle.dumps(stage))
    assert torch.equal(copy[WEIGHT], stage[WEIGHT])
    assert len([*(tmp_path / "tmp").iterdir()]) == 2
    copy.close()
    stage.close()
    assert [*(tmp_path / "tmp").iterdir()] == []


def test_a_model_may_be_a_recipe_file(toys: dict[str, str], tmp_path: Path) -> None:
    data = staged(toys)
    inner = make_recipe(data["stages"].pop("half"))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "half.yaml").write_text(inner.to_yaml())
    data["experts"][0]["path"] = "inner/half.yaml"
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.stages["inner/half.yaml"].method == inner.method
    due = dict(merge_tensors(make_plan(make_recipe(staged(toys)))))
    assert torch.equal(dict(merge_tensors(make_plan(recipe)))[WEIGHT], due[WEIGHT])
    (tmp_path / "inner" / "half.yaml").write_text("experts: [{path: ../recipe.yaml}]")
    with pytest.raises(RecipeError, match="is a stage of itself"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_stage_of_stages_with_a_base_that_is_one(toys: dict[str, str]) -> None:
    mean = {"experts": [{"path": toys["e0"]}, {"path": toys["e1"]}]}
    data = {
        "base": "mean",
        "experts": [{"path": "outer"}],
        "method": {"name": "task_arithmetic", "scale": 1.0},
        "stages": {"mean": mean, "outer": {"experts": [{"path": "mean"}, {"path": toys["e2"]}]}},
    }
    plan = make_plan(make_recipe(data))
    found = dict(merge_tensors(plan))[WEIGHT]
    e = [open_checkpoint(toys[f"e{i}"])[WEIGHT].float() for i in range(3)]
    inner = ((e[0] + e[1]) / 2).bfloat16().float()
    assert torch.equal(found, ((inner + e[2]) / 2).bfloat16())


def test_stages_that_make_no_sense(toys: dict[str, str]) -> None:
    data = staged(toys)
    with pytest.raises(RecipeError, match="stage 'idle' is no model of the recipe"):
        make_recipe({**data, "stages": {**data["stages"], "idle": data["stages"]["half"]}})
    data["stages"]["half"]["repair"] = {"batch_norm": "inputs.npz"}
    with pytest.raises(PlanError, match="stage half: a repair is made of the result"):
        make_plan(make_recipe(data))


def test_the_digest_knows_stages(toys: dict[str, str]) -> None:
    data = staged(toys)
    before = make_recipe(data).digest()
    data["stages"]["half"]["method"]["density"] = 0.25
    assert make_recipe(data).digest() != before


def test_an_adapter_on_a_model_of_its_own(toys: dict[str, str], tmp_path: Path) -> None:
    factors = {"A": torch.ones(1, 500), "B": torch.ones(300, 1)}
    tensors = {f"layer.0.lora_{name}.weight": tensor for name, tensor in factors.items()}
    one, two = (str(save_adapter(tmp_path / name, tensors)) for name in ("one", "two"))
    found = open_model(f"{toys['e0']}+{one}+{two}", ())
    due = open_checkpoint(toys["e0"])[WEIGHT].double() + 4
    assert torch.equal(found[WEIGHT], due)
    plain = str(save(tmp_path / "odd+name", {WEIGHT: torch.zeros(2, 2)}))
    assert open_model(plain, ())[WEIGHT].shape == (2, 2)
    # the first expert says what is written: the dtype of its files, not that of the sum
    recipe = make_recipe({"experts": [{"path": f"{toys['e0']}+{one}"}, {"path": toys["e1"]}]})
    assert make_plan(recipe).tasks[WEIGHT].spec.dtype == torch.bfloat16
    kept = make_recipe(
        {"experts": [{"path": f"{toys['e0']}+{one}"}], "method": {"name": "keep", "model": 1}}
    )
    assert torch.equal(dict(merge_tensors(make_plan(kept)))[WEIGHT], (due - 2).bfloat16())


def test_a_place_that_is_too_small_for_a_stage_is_named(
    toys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_plan(make_recipe(staged(toys))).warnings == ()
    usage = type(shutil.disk_usage("/"))(10**12, 10**12, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    (warning,) = make_plan(make_recipe(staged(toys))).warnings
    assert warning.startswith("stage half: 0.0 GB are to lie in ")
    assert warning.endswith("which has 0.0 GB free; let TMPDIR name a larger disk.")
