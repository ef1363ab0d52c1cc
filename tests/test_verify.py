"""verify --deep: inputs and a sample of tensors, made again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_device
import test_repair
import torch
from safetensors.torch import load_file, save_file
from toys import family, recipe_of, save

from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.repair import repair_folder
from mergewell.repair_step import RepairStep, step_parts
from mergewell.run import run
from mergewell.storage.manifest import hash_file
from mergewell.verify import elements_apart, verify_deep


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


def problems(folder: Path, **more: int) -> list[str]:
    return list(verify_deep(folder, **more).problems)


def forge(folder: Path, name: str, position: int, steps: int | None = None) -> None:
    """Change one element and the manifest with it, as somebody might who wants to deceive.

    By 1, or by so many steps of bfloat16 away from zero.
    """
    file = folder / "model.safetensors"
    state = load_file(file)
    if steps is None:
        state[name].view(-1)[position] += 1
    else:
        state[name].view(-1).view(torch.int16)[position] += steps
    save_file(state, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["outputs"][0] |= {"hash": hash_file(file), "bytes": file.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_sound_folder_has_no_problem(merged: Path) -> None:
    found = verify_deep(merged)
    assert (found.problems, found.notes) == ((), ())


def test_progress_counts_the_bytes_of_every_step(merged: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def note(step: str, done: int, total: int) -> None:
        assert done > seen.get(step, (0, 0))[0]
        seen[step] = (done, total)

    verify_deep(merged, on_step=note)
    assert list(seen) == ["files", "inputs", "tensors"]
    assert all(done == total > 400_000 for done, total in seen.values())


def test_a_forged_element_is_found_where_hashes_are_silent(merged: Path) -> None:
    forge(merged, "layer.0.weight", 77)
    (problem,) = problems(merged)
    assert problem.startswith("layer.0.weight differs") and "in 1 of 150000 elements" in problem
    found = [problems(merged, sample=1, seed=seed) for seed in range(12)]
    assert [] in found and [problem] in found, "a sample of one of six tensors"


def test_one_step_is_a_forgery_on_the_cpu(merged: Path) -> None:
    forge(merged, "layer.0.weight", 77, steps=1)
    (problem,) = problems(merged)
    assert "in 1 of 150000 elements" in problem and "step" not in problem


def test_another_device_may_be_one_step_off_and_it_is_said(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    plan = make_plan(recipe_of(base, experts, {"name": "ties", "density": 0.5}))
    out = tmp_path / "out"
    run(plan, out, workers=1, device=test_device.Far())
    found = verify_deep(out)
    assert found.problems == ()
    (note,) = found.notes
    assert "merged on far and made again on cpu" in note and "0 of 6 tensors do" in note
    forge(out, "layer.0.weight", 77, steps=1)
    found = verify_deep(out)
    assert found.problems == () and "1 of 6 tensors do" in found.notes[0]
    forge(out, "layer.0.weight", 78, steps=2)
    (problem,) = verify_deep(out).problems
    assert "by more than one step in 1 of 150000 elements" in problem


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_steps_are_counted_across_zero(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least above 0
    one = torch.tensor([1.0, 0.0, tiny, -1.0, 1.0], dtype=dtype)
    other = torch.tensor([1.0, -0.0, -tiny, 1.0, 1 + torch.finfo(dtype).eps], dtype=dtype)
    assert elements_apart(one, other, 0) == 4
    assert elements_apart(one, other, 1) == 2, "-1 and 1; from -tiny to tiny are two steps"
    assert elements_apart(one, other, 2) == 1
    assert elements_apart(one, one.clone(), 0) == 0


def test_a_changed_or_missing_input_is_named_first(merged: Path, tmp_path: Path) -> None:
    expert = tmp_path / "expert1"
    state = load_file(expert / "model.safetensors")
    state["scale"] += 1
    save(expert, state)
    (problem,) = problems(merged)
    assert "expert1/model.safetensors changed" in problem
    (expert / "model.safetensors").unlink()
    (problem,) = problems(merged)
    assert "expert1/model.safetensors is gone" in problem


def test_relative_paths_are_those_of_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(tmp_path / "models", experts=1)
    monkeypatch.chdir(tmp_path / "models")
    recipe = {"base": "base", "experts": [{"path": "expert0"}], "method": {"name": "average"}}
    run(make_plan(make_recipe(recipe)), "out")
    monkeypatch.chdir(tmp_path)
    assert problems(Path("models/out")) == []


def test_another_dtype_is_named(merged: Path) -> None:
    file = merged / "model.safetensors"
    state = load_file(file)
    save_file({**state, "scale": state["scale"].to(torch.float32)}, file)
    manifest = json.loads((merged / "manifest.json").read_text())
    manifest["outputs"][0] |= {"hash": hash_file(file), "bytes": file.stat().st_size}
    (merged / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = problems(merged)
    assert problem.startswith("scale is torch.float32 []")


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a factory of the nets of the repair's tests."""
    module = ModuleType("nets_to_verify")
    module.live, module.plain = test_repair.live, test_repair.plain  # pyright: ignore
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


@pytest.mark.parametrize(("kind", "net"), [("batch_norm", "live"), ("repair", "plain")])
def test_a_repaired_folder_is_repaired_again(
    tmp_path: Path, factory: str, kind: str, net: str
) -> None:
    folder, _ = test_repair.merged(tmp_path, getattr(test_repair, net))
    save_file({"x": torch.cat(test_repair.BATCHES)}, tmp_path / "data.safetensors")
    step = RepairStep.model_validate(
        {kind: str(tmp_path / "data.safetensors"), "model_factory": f"{factory}:{net}"}
    )
    made = repair_folder(
        folder, *step_parts(step, str(folder)), tmp_path / "out", step.kind, step=step
    )
    assert [Path(file.path).name for file in made.inputs] == ["model.safetensors", step.data[-16:]]
    found = verify_deep(tmp_path / "out")
    assert (found.problems, found.notes) == ((), ())
    changed = load_file(tmp_path / "out" / "model.safetensors")
    repaired = made.model_dump()["repair"]["tensors"][0]
    changed[repaired].view(-1)[0] *= 1 + 1e-6
    rewrite(tmp_path / "out", changed)
    found = verify_deep(tmp_path / "out")
    assert found.problems == () and "1 repaired tensors differ" in found.notes[0]
    changed[repaired].view(-1)[0] += 0.1
    rewrite(tmp_path / "out", changed)
    assert [p.partition(" ")[0] for p in problems(tmp_path / "out")] == [repaired]
    changed["0.weight" if net == "live" else "3.weight"].view(-1)[0] += 1
    rewrite(tmp_path / "out", changed)
    assert len(problems(tmp_path / "out")) == 2, "what was not repaired is the merged folder's"


def rewrite(folder: Path, state: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file(state, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    for output in manifest["outputs"]:
        if output["file"] == file.name:
            output |= {"hash": hash_file(file), "bytes": file.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_repair_on_unnamed_inputs_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    folder, _ = test_repair.merged(tmp_path, test_repair.live)  # pyright: ignore
    repair_folder(folder, test_repair.live, test_repair.BATCHES, tmp_path / "out")
    found = verify_deep(tmp_path / "out")
    assert found.problems == () and "2 tensors were repaired" in found.notes[0]
    state = load_file(folder / "model.safetensors")
    state["0.weight"] += 1
    save_file(state, folder / "model.safetensors")
    (problem,) = problems(tmp_path / "out")
    assert "merged/model.safetensors has" in problem
