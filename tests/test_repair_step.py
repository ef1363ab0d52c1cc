"""A repair that a recipe asks for: made by `merge`, in the same output, told by the manifest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_repair
import torch
from safetensors.torch import load_file, save_file

from mergewell.cli.main import main
from mergewell.errors import DataError, ModelError, OutputError, RecipeError
from mergewell.jobs import run_shard
from mergewell.plan import Plan, make_plan
from mergewell.recipe import Recipe, make_recipe, read_recipe
from mergewell.repair import mended, repair_folder
from mergewell.run import merge_tensors, run
from mergewell.storage.manifest import hash_file, read_manifest, verify_files
from mergewell.verify import verify_deep


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("nets_to_mend")
    module.live, module.plain = test_repair.live, test_repair.plain  # pyright: ignore
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def recipe_of(folder: Path, factory: str, net: str = "live", **more: Any) -> Recipe:
    """Write experts, their merge without repair and inputs; return the recipe with repair."""
    merged, _ = test_repair.merged(folder, getattr(test_repair, net))
    save_file({"x": torch.cat(test_repair.BATCHES)}, folder / "data.safetensors")
    kind = "batch_norm" if net == "live" else "repair"
    step = {kind: str(folder / "data.safetensors"), "model_factory": f"{factory}:{net}"}
    return make_recipe({**read_manifest(merged).recipe, "repair": step, **more})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("net", ["live", "plain"])
def test_the_merge_is_repaired_as_the_command_repairs_it(
    tmp_path: Path, factory: str, net: str
) -> None:
    recipe = recipe_of(tmp_path, factory, net)
    manifest = run(make_plan(recipe), tmp_path / "out", workers=2)
    kind = "batch_norm" if net == "live" else "repair"
    batches = [torch.cat(test_repair.BATCHES)]
    make = getattr(test_repair, net)
    by_command = repair_folder(tmp_path / "merged", make, batches, tmp_path / "two", kind)
    here, there = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "two"))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    told, other = (m.model_dump()["repair"] for m in (manifest, by_command))
    for key in ("kind", "samples", "layers", "untouched", "tensors", "warnings"):
        assert told[key] == other[key], key
    assert told["samples"] == 40
    data = tmp_path / "data.safetensors"
    assert [f.hash for f in manifest.inputs if f.path == str(data)] == [hash_file(data)]
    assert manifest.recipe["repair"][kind] == str(data)
    assert set(told["tensors"]) <= set(manifest.relative_changes)
    assert verify_files(tmp_path / "out") == []
    found = verify_deep(tmp_path / "out")
    assert (found.problems, found.notes) == ((), ())


def test_a_forged_statistic_is_found(tmp_path: Path, factory: str) -> None:
    run(make_plan(recipe_of(tmp_path, factory)), tmp_path / "out", workers=1)
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    state["1.running_mean"][0] += 0.1
    save_file(state, file)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["outputs"][0] |= {"hash": hash_file(file), "bytes": file.stat().st_size}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify_deep(tmp_path / "out").problems
    assert problem.startswith("1.running_mean differs")


def test_jobs_and_resuming_give_the_same_bytes(tmp_path: Path, factory: str) -> None:
    plan = make_plan(recipe_of(tmp_path, factory, shard_bytes=100))
    assert len(plan.layouts) > 2
    run(plan, tmp_path / "whole", workers=1)
    for index in (1, 0):
        run_shard(plan, tmp_path / "jobs", index, 2)
    assert bytes_of(tmp_path / "jobs") == bytes_of(tmp_path / "whole")
    assert read_manifest(tmp_path / "jobs").model_dump()["repair"]["samples"] == 40
    key = plan.resume_key()
    save_file({"x": torch.cat(test_repair.BATCHES)[:30]}, tmp_path / "data.safetensors")
    assert plan.resume_key() != key, "a run on other inputs is not resumed"


def test_the_manifest_makes_it_again(tmp_path: Path, factory: str) -> None:
    run(make_plan(recipe_of(tmp_path, factory)), tmp_path / "out", workers=1)
    again = read_recipe(tmp_path / "out" / "manifest.json")
    run(make_plan(again), tmp_path / "again", workers=1)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")


def test_a_plan_is_mended_once_and_the_merge_before_can_be_had(
    tmp_path: Path, factory: str
) -> None:
    plan = make_plan(recipe_of(tmp_path, factory))
    done = mended(plan)
    assert mended(done) is done and plan.mended is None
    assert done.mended is not None
    assert sorted(done.mended.tensors) == ["1.running_mean", "1.running_var"]
    before, after = dict(merge_tensors(plan)), dict(merge_tensors(done))
    plain = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(before[name], plain[name]) for name in plain)
    differ = {name for name in plain if not torch.equal(before[name], after[name])}
    assert differ == set(done.mended.tensors)


def test_what_cannot_be_is_refused_before_the_merge(tmp_path: Path, factory: str) -> None:
    data = recipe_of(tmp_path, factory).as_data()
    step = data["repair"]

    def planned(**changed: Any) -> Plan:
        return make_plan(make_recipe({**data, "repair": {**step, **changed}}))

    with pytest.raises(DataError, match="no inputs at /nowhere"):
        planned(batch_norm="/nowhere")
    with pytest.raises(RecipeError, match="under one of batch_norm and repair"):
        planned(repair="x")
    with pytest.raises(ModelError, match="names no model"):
        planned(model_factory="x y")
    with pytest.raises(RecipeError, match="no parameter"):
        planned(sample=3)
    files = [{"path": str(tmp_path / f"e{i}/model.safetensors")} for i in (1, 2)]
    alone = {**data, "experts": files}
    with pytest.raises(ModelError, match="is no Hugging Face folder"):
        make_plan(make_recipe({**alone, "repair": {"batch_norm": step["batch_norm"]}}))
    plain = recipe_of(tmp_path / "p", factory, "plain").as_data()
    plain["repair"]["batch_norm"] = plain["repair"].pop("repair")
    with pytest.raises(ModelError, match="has no BatchNorm"):
        run(make_plan(make_recipe(plain)), tmp_path / "out")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*out*"))
    with pytest.raises(OutputError, match="exists already"):
        run(planned(), tmp_path / "e1")


def test_a_recipe_without_repair_has_the_digest_that_it_had() -> None:
    recipe = make_recipe({"base": "b", "experts": [{"path": "a"}], "method": {"name": "ties"}})
    assert recipe.digest() == "33664810f0750225"
    assert "repair" not in recipe.as_data()


def test_paths_of_inputs_are_relative_to_the_recipe(tmp_path: Path, factory: str) -> None:
    data = recipe_of(tmp_path, factory).as_data()
    data["repair"]["batch_norm"] = "data.safetensors"
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.repair is not None
    assert recipe.repair.data == str(tmp_path / "data.safetensors")


def test_the_command_line_tells_of_it(
    tmp_path: Path, factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of(tmp_path, factory).to_yaml())
    assert main(["plan", str(file)]) == 0
    assert "then BatchNorms are re-estimated on at most 1024 inputs of" in capsys.readouterr().out
    assert main(["merge", str(file), "--out", str(tmp_path / "out")]) == 0
    assert "1 layer repaired on 40 samples" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out"), "--deep"]) == 0
