"""A merged folder repaired into a new folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mergewell.errors import CheckpointError, ModelError, OutputError, RecipeError
from mergewell.explain.split import soup
from mergewell.models.batch_norm import reestimate
from mergewell.models.repair import repair
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.repair import checked_kind, repair_folder
from mergewell.run import run
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import verify_files


def live() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))


BATCHES = [torch.randn(20, 1, 6, 6, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]


def merged(folder: Path, make: type[nn.Module]) -> tuple[Path, list[nn.Module]]:
    """Two trained experts and their average in a folder; paths in the recipe are absolute."""
    experts: list[nn.Module] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = make().train()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            functional.cross_entropy(module(BATCHES[0]), torch.arange(20) % 3).backward()
            optimizer.step()
        experts.append(module.eval())
        (folder / f"e{seed}").mkdir(parents=True)
        state = {name: t.contiguous() for name, t in module.state_dict().items()}
        save_file(state, folder / f"e{seed}" / "model.safetensors")
        (folder / f"e{seed}" / "config.json").write_text('{"model_type": "x"}')
    recipe = make_recipe({"experts": [{"path": str(folder / f"e{seed}")} for seed in (1, 2)]})
    run(make_plan(recipe), folder / "merged", workers=1)
    return folder / "merged", experts


def same(stored: Tensor, expected: Tensor) -> bool:
    return torch.allclose(stored, expected, atol=1e-6)


def test_only_the_running_statistics_are_new(tmp_path: Path) -> None:
    folder, experts = merged(tmp_path, live)  # pyright: ignore
    manifest = repair_folder(folder, live, BATCHES, tmp_path / "out")
    expected = soup(experts)
    reestimate(expected, BATCHES)
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "out")
    assert list(after) == list(before)
    for name, tensor in expected.state_dict().items():
        assert same(after[name], tensor), name
        changed = name.endswith(("running_mean", "running_var"))
        assert torch.equal(after[name], before[name]) is not changed, name
    done = manifest.model_dump()["repair"]
    assert (done["kind"], done["samples"], done["layers"]) == ("batch_norm", 40, ["1"])
    assert done["recipe"]["method"] == {"name": "average"}
    assert done["warnings"] == []
    assert (manifest.tensors, manifest.tensors_changed) == (9, 2)
    assert verify_files(tmp_path / "out") == []
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "x"}'


def test_repair_takes_the_experts_of_the_recipe(tmp_path: Path) -> None:
    folder, experts = merged(tmp_path, plain)  # pyright: ignore
    manifest = repair_folder(folder, plain, BATCHES, tmp_path / "out", "repair")
    expected = soup(experts)
    repair(expected, experts, [0.5, 0.5], BATCHES)
    after = open_checkpoint(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        assert same(after[name], tensor), name
    done = manifest.model_dump()["repair"]
    assert done["layers"] == ["1"]
    assert done["untouched"] == {"3": "gives the module's output"}
    assert done["tensors"] == ["1.bias", "1.weight"]


def test_what_cannot_be_repaired_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder, _ = merged(tmp_path, plain)  # pyright: ignore
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="has no BatchNorm"):
        repair_folder(folder, plain, BATCHES, out)
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        repair_folder(tmp_path / "e1", plain, BATCHES, out, "repair")
    with pytest.raises(OutputError, match="exists already"):
        repair_folder(folder, plain, BATCHES, tmp_path / "e1", "repair")
    assert not out.exists()
    with pytest.raises(RecipeError, match="no repair 'batchnorm': did you mean 'batch_norm'"):
        checked_kind("batchnorm")


def test_names_with_a_prefix_and_a_narrower_dtype_are_written_as_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = live().state_dict()
    stored = {
        f"model.{name}": t.bfloat16() if t.is_floating_point() else t for name, t in state.items()
    }
    (tmp_path / "in").mkdir()
    save_file(stored, tmp_path / "in" / "model.safetensors")
    manifest = repair_folder(tmp_path / "in", live, BATCHES, tmp_path / "out")
    after = open_checkpoint(tmp_path / "out")
    assert after["model.1.running_mean"].dtype == torch.bfloat16
    assert after["model.1.running_mean"].abs().sum() > 0
    assert manifest.model_dump()["repair"]["recipe"] is None


def test_experts_with_frozen_statistics_are_warned_of(tmp_path: Path) -> None:
    paths: list[str] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        paths.append(str(tmp_path / f"e{seed}.safetensors"))
        save_file(live().state_dict(), paths[-1])
    recipe = make_recipe({"experts": [{"path": path} for path in paths]})
    run(make_plan(recipe), tmp_path / "merged", workers=1)
    manifest = repair_folder(tmp_path / "merged", live, BATCHES, tmp_path / "out")
    (warning,) = manifest.model_dump()["repair"]["warnings"]
    assert "trained with these frozen" in warning
    Path(paths[0]).unlink()
    manifest = repair_folder(tmp_path / "merged", live, BATCHES, tmp_path / "again")
    assert manifest.model_dump()["repair"]["warnings"] == []


def test_relative_paths_of_a_recipe_are_found_from_where_the_merge_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(tmp_path, plain)  # pyright: ignore
    monkeypatch.chdir(tmp_path)
    run(make_plan(make_recipe({"experts": [{"path": "e1"}, {"path": "e2"}]})), "again", workers=1)
    monkeypatch.chdir("/")
    manifest = repair_folder(tmp_path / "again", plain, BATCHES, tmp_path / "out", "repair")
    assert manifest.model_dump()["repair"]["layers"] == ["1"]
