"""What `merge` puts beside a merge: companions that give the experts back, and a model card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import family

from mergewell.cli.main import main
from mergewell.companions.base import expert_state
from mergewell.errors import CheckpointError, OutputError
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.restore import restore_expert
from mergewell.run import run
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import read_manifest, verify_files
from mergewell.storage.staging import Staging


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    base, experts = family(tmp_path, dtype=torch.float32)
    found = ["merge", "--base", str(base), "--out", str(tmp_path / "out")]
    return [*found, *(part for expert in experts for part in ("--expert", str(expert)))]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert sentence in message and message.count("\n") == 1, message


@pytest.mark.parametrize(
    ("companion", "method"), [("emr", "emr"), ("tall_masks:threshold=0.3", "task_arithmetic")]
)
def test_experts_are_given_back(
    given: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    companion: str,
    method: str,
) -> None:
    assert main([*given, "--method", method, "--companion", companion]) == 0
    name = f"{companion.partition(':')[0]}.companion.safetensors"
    out, back = tmp_path / "out", tmp_path / "back"
    assert name in {file.file for file in read_manifest(out).outputs}
    assert verify_files(out) == []
    assert main(["verify", str(out), "--deep"]) == 0
    assert main(["restore", str(out), "--expert", "expert1", "--out", str(back)]) == 0
    assert "expert1, 5 of 6 tensors given back" in capsys.readouterr().out
    state = expert_state(open_checkpoint(out), out / name, "expert1")
    restored = open_checkpoint(back)
    assert all(torch.equal(restored[tensor], state[tensor]) for tensor in state)
    assert main(["verify", str(back), "--deep"]) == 0
    assert "no tensor was made again" in capsys.readouterr().out
    (out / name).write_bytes(b"x")
    refused(capsys, ["verify", str(out)], name)


def test_mistakes_are_sentences_before_the_merge(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    emr = [*given, "--method", "emr"]
    refused(capsys, [*emr, "--companion", "erm"], "--companion: There is no companion 'erm'")
    refused(capsys, [*emr, "--companion", "tall_masks"], "goes with merges by task_arithmetic or")
    refused(capsys, [*emr, "--companion", "emr:rescale=x"], "--companion emr: rescale=x: companion")
    refused(capsys, [*emr, "--companion", "emr", "--shard", "0/2"], "exclude each other")
    assert not (tmp_path / "out").exists()
    assert main(emr) == 0
    restore = [
        "restore",
        str(tmp_path / "out"),
        "--expert",
        "expert0",
        "--out",
        str(tmp_path / "b"),
    ]
    refused(capsys, restore, "holds no companions")
    refused(capsys, restore[:2], "add --expert NAME")
    refused(capsys, restore[:4], "add --out DIR")
    refused(capsys, ["plan", str(tmp_path / "expert0" / "x.json")], "cannot read the recipe")


def test_a_companion_that_fails_leaves_no_output(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    paths = [{"path": str(path)} for path in experts]
    plan = make_plan(make_recipe({"base": str(base), "experts": paths, "method": {"name": "emr"}}))

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OutputError("no more room")

    with pytest.raises(OutputError, match="no more room"):
        run(plan, tmp_path / "out", beside={"emr.companion.safetensors": fail})
    assert not (tmp_path / "out").exists()
    run(plan, tmp_path / "out", resume=True)
    assert not list((tmp_path / "out").glob("*.companion.*")), "half a file of the failed run"
    assert not Staging(tmp_path / "out").root.exists()
    with pytest.raises(CheckpointError, match="holds no companions"):
        restore_expert(tmp_path / "out", "expert0", tmp_path / "back")


def test_a_card_stands_in_the_folder_and_the_folder_stays_true(
    given: list[str], tmp_path: Path
) -> None:
    assert main([*given, "--method", "ties", "--card"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ties" in card and "2306.01708" in card
    verify_files(tmp_path / "out")
