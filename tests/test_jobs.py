"""Shard jobs and resuming: unfinished files only, the same bytes, a manifest that is right."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import family, save

from mergewell.errors import CheckpointError, OutputError, PlanError, RecipeError
from mergewell.jobs import parse_shard, run_shard
from mergewell.plan import Plan, make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import run
from mergewell.storage.manifest import hash_file, read_manifest, verify_files
from mergewell.storage.staging import Staging


def recipe_for(folder: Path, method: str = "ties", shards: int = 3, **more: object) -> Recipe:
    base, experts = family(folder, shards=shards)
    return make_recipe(
        {
            "base": str(base),
            "experts": [{"path": str(expert)} for expert in experts],
            "method": {"name": method},
            **more,
        }
    )


def contents(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {file.name: file.read_bytes() for file in folder.iterdir()}
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["seconds"]
    return {**found, "manifest.json": manifest}


class StopError(Exception):
    """Raised by a test in the middle of a merge."""


def stop_after(plan: Plan, out: Path, files: int) -> None:
    """Break a run off with the first block of the file after `files` finished ones."""

    def stop(_: int) -> None:
        if len(list(Staging(out).done.glob("*.json"))) >= files:
            raise StopError

    with pytest.raises(StopError):
        run(plan, out, workers=1, on_progress=stop)


def test_a_resumed_merge_redoes_unfinished_files_and_says_the_same(tmp_path: Path) -> None:
    plan = make_plan(recipe_for(tmp_path))
    run(plan, tmp_path / "whole", workers=1)
    out = tmp_path / "out"
    stop_after(plan, out, 2)
    assert not out.exists()
    written: list[int] = []
    run(plan, out, workers=1, resume=True, on_progress=written.append)
    assert contents(out) == contents(tmp_path / "whole")
    last = sum(spec.nbytes for spec in plan.layouts[2].specs)
    assert sum(written) == last < plan.write_bytes


def test_the_manifest_says_how_far_tensors_moved(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(4)})
    expert = save(tmp_path / "expert", {"a": torch.tensor([3.0, 4.5]), "b": torch.ones(4)})
    recipe = {"base": str(base), "experts": [{"path": str(expert)}], "method": {"name": "average"}}
    manifest = run(make_plan(make_recipe(recipe)), tmp_path / "out")
    assert (manifest.tensors, manifest.tensors_changed) == (2, 1)
    assert manifest.relative_changes == {"a": pytest.approx(0.1)}  # 0.5 of a norm of 5
    assert manifest.relative_change == pytest.approx(0.5 / 29**0.5, rel=1e-5)


def test_a_resumed_merge_that_changes_nothing_is_still_refused(tmp_path: Path) -> None:
    base, _ = family(tmp_path, shards=3)
    state = {n: t for f in sorted(base.glob("*.safetensors")) for n, t in load_file(f).items()}
    same = save(tmp_path / "same", state, shards=3)
    recipe = {"base": str(base), "experts": [{"path": str(same)}], "method": {"name": "average"}}
    plan = make_plan(make_recipe(recipe))
    stop_after(plan, tmp_path / "out", 1)
    with pytest.raises(PlanError, match="equals the base"):
        run(plan, tmp_path / "out", resume=True)
    assert not Staging(tmp_path / "out").root.exists()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_jobs_in_any_order_make_the_same_folder_and_the_last_commits(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    recipe = recipe_for(tmp_path, "dare")
    whole = run(make_plan(recipe), tmp_path / "whole")
    out = tmp_path / "out"
    results = [run_shard(make_plan(recipe), out, index, 3) for index in order]
    assert [len(result.missing) for result in results] == [2, 1, 0]
    assert [result.manifest is None for result in results] == [True, True, False]
    assert contents(out) == contents(tmp_path / "whole")
    assert verify_files(out) == [] and len(whole.inputs) == 12
    late = run_shard(make_plan(recipe), out, 0, 3)
    assert (late.written, late.missing, late.manifest) == ((), (), None)
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(OutputError, match="exists already"):
        run_shard(make_plan(other), out, 0, 3)


def test_seconds_of_jobs_and_of_broken_runs_are_added_up(tmp_path: Path) -> None:
    plan = make_plan(recipe_for(tmp_path))
    out = tmp_path / "out"
    for index, seconds in ((0, 1000.0), (1, 200.0)):
        run_shard(plan, out, index, 3)
        record = Staging(out).done / f"{plan.layouts[index].file}.json"
        content = json.loads(record.read_text())
        assert 0 < content["notes"]["seconds"] < 100
        content["notes"]["seconds"] = seconds
        record.write_text(json.dumps(content))
    manifest = run_shard(plan, out, 2, 3).manifest
    assert manifest is not None and 1200 < manifest.seconds < 1300
    assert run(plan, tmp_path / "whole").seconds < 100


def test_more_jobs_than_files_and_a_statistic_of_the_whole_model(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, shards=2).model_dump(mode="json")
    recipe["method"] = {"name": "ties", "density": 0.3, "trim_scope": "model"}
    plan = make_plan(make_recipe(recipe))
    run(plan, tmp_path / "whole")
    for index in range(4):
        run_shard(plan, tmp_path / "out", index, 4)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_job_may_be_run_again_and_resuming_finishes_what_jobs_left(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    plan = make_plan(recipe)
    run(plan, tmp_path / "whole")
    out = tmp_path / "out"
    assert len(run_shard(plan, out, 1, 3).written) == 1
    assert run_shard(plan, out, 1, 3).written == ()
    before = (Staging(out).files / plan.layouts[1].file).stat().st_mtime_ns
    run(plan, out, resume=True)
    assert (out / plan.layouts[1].file).stat().st_mtime_ns == before
    assert contents(out) == contents(tmp_path / "whole")


def test_jobs_share_the_output_and_keep_other_writers_out(tmp_path: Path) -> None:
    plan = make_plan(recipe_for(tmp_path))
    out = tmp_path / "out"
    refused: list[str] = []

    def intrude(_: int) -> None:
        if not refused:
            with pytest.raises(OutputError, match="being written by another process") as caught:
                run(plan, out, workers=1)
            refused.append(str(caught.value))
            with pytest.raises(OutputError, match=r"00001-of-00003.*being written"):
                run_shard(plan, out, 0, 3, workers=1)
            assert run_shard(plan, out, 1, 3, workers=1).missing  # another file is free

    run_shard(plan, out, 0, 3, workers=1, on_progress=intrude)
    assert refused


def test_jobs_of_another_recipe_are_kept_apart(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    run_shard(make_plan(recipe), tmp_path / "out", 0, 3)
    other = make_plan(recipe.model_copy(update={"seed": 1}))
    with pytest.raises(OutputError, match="another recipe"):
        run_shard(other, tmp_path / "out", 1, 3)


def test_an_input_that_changes_during_the_merge_is_an_error(tmp_path: Path) -> None:
    plan = make_plan(recipe_for(tmp_path))
    touched = plan.experts[0].files[0]

    def touch(_: int) -> None:
        os.utime(touched, ns=(1, 1))

    with pytest.raises(CheckpointError, match=r"expert0.*changed while it was merged"):
        run(plan, tmp_path / "out", on_progress=touch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("algorithm", ["xxh3-128", "sha256"])
@pytest.mark.parametrize("workers", [1, 4])
def test_inputs_are_hashed_as_they_are_read(tmp_path: Path, algorithm, workers: int) -> None:
    rules = [{"match": "embed.*", "omit": True}, {"match": "*.bias", "method": {"name": "keep"}}]
    plan = make_plan(recipe_for(tmp_path, shards=1, rules=rules))
    manifest = run(plan, tmp_path / "out", workers=workers, block=1024, algorithm=algorithm)
    for file in manifest.inputs:
        assert file.hash == hash_file(Path(file.path), algorithm)
    assert all(output.hash.startswith(f"{algorithm}:") for output in manifest.outputs)


def test_shard_bytes_splits_the_result(tmp_path: Path) -> None:
    whole = make_plan(recipe_for(tmp_path, shards=1))
    plan = make_plan(recipe_for(tmp_path / "split", shards=1, shard_bytes=301_000))
    names = [[spec.name for spec in layout.specs] for layout in plan.layouts]
    # bf16: embed 160,000 · layer.0.bias 600 · layer.0.weight 300,000 · layer.1.weight 9,600
    assert [name for group in names for name in group] == list(whole.tasks)
    sizes = [sum(spec.nbytes for spec in layout.specs) for layout in plan.layouts]
    assert len(sizes) > 1 and all(size <= 301_000 for size in sizes)
    assert plan.layouts[0].file == f"model-00001-of-{len(names):05d}.safetensors"
    for left, right in pairwise(names):
        filled = sum(plan.tasks[n].spec.nbytes for n in left)
        assert filled + plan.tasks[right[0]].spec.nbytes > 301_000, (
            "a file is begun when one is full"
        )
    tiny = make_plan(recipe_for(tmp_path / "tiny", shards=1, shard_bytes=1))
    assert [len(layout.specs) for layout in tiny.layouts] == [1] * 6
    run(tiny, tmp_path / "out")
    assert read_manifest(tmp_path / "out").tensors == 6


def test_shard_flags_are_read_or_refused() -> None:
    assert parse_shard("0/1") == (0, 1) and parse_shard("7/12") == (7, 12)
    for wrong in ("1/1", "0/0", "-1/2", "a/b", "1", "1/2/3", "", "0/1 ", "²/3"):
        with pytest.raises(RecipeError, match="write it as i/N"):
            parse_shard(wrong)
