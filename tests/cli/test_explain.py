"""The commands `explain` and `repair`, as functions of an app."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import nn

from mergewell.cli.explain import explain, repair
from mergewell.errors import DataError, ModelError, OutputError, RecipeError

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(explain)
app.command()(repair)


def run(*arguments: str | Path) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two experts and labelled data in a folder, and a module that makes the architecture."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        (tmp_path / f"e{seed}").mkdir()
        save_file(net().state_dict(), tmp_path / f"e{seed}" / "model.safetensors")
    labels = np.arange(40) % 3
    inputs = np.random.default_rng(0).normal(size=(40, 6)) + labels[:, None]
    np.savez(tmp_path / "data.npz", inputs=inputs, labels=labels)
    np.savez(tmp_path / "unlabelled.npz", inputs=inputs)
    module = ModuleType("nets_of_this_test")
    module.net = net  # pyright: ignore
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return tmp_path


def flags(files: Path, data: str = "data.npz") -> list[str | Path]:
    return ["explain", "--expert", files / "e1", "--expert", files / "e2", "--data", files / data,
            "--model-factory", "nets_of_this_test:net"]  # fmt: skip


def test_explain_prints_sentences_and_every_way(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*flags(files), "--html", files / "page.html")
    told = capsys.readouterr().out
    for start in (
        "Templates: ",
        "Averaging: ",
        "Stability: ",
        "\nAnswers right against the labels",
    ):
        assert start in told
    assert "uniform soup (BatchNorm re-estimated)" in told
    assert "expert e1" in told
    assert (files / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_explain_json_is_the_contract(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*flags(files, "unlabelled.npz"), "--json", "--samples", "20")
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == 1
    assert (found["experts"], found["samples"], found["labels"]) == (["e1", "e2"], 20, "ensemble")
    assert "greedy_soup" in found["averaging"]["left_out"]


def test_repair_writes_and_says_what_it_did(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["repair", files / "e1", "--data", files / "data.npz", "--model-factory",
               "nets_of_this_test:net"]  # fmt: skip
    run(*command, "--out", files / "out")
    assert "1 layer repaired on 40 samples, 2 of 9 tensors changed" in capsys.readouterr().out
    run(*command, "--out", files / "other", "--json")
    assert json.loads(capsys.readouterr().out)["layers"] == ["1"]
    with pytest.raises(OutputError, match="add --out DIR"):
        run(*command)
    with pytest.raises(RecipeError, match="no repair 'x'"):
        run(*command, "--out", files / "third", "--kind", "x")


def test_mistakes_are_sentences(files: Path) -> None:
    with pytest.raises(DataError, match="add --data PATH"):
        run(*flags(files)[:5], "--model-factory", "nets_of_this_test:net")
    with pytest.raises(RecipeError, match="no expert is named"):
        run("explain", "--data", files / "data.npz")
    with pytest.raises(RecipeError, match=r"e1 has the coefficient 0\.5; drop it"):
        run("explain", "--expert", f"{files / 'e1'}:0.5", "--data", files / "data.npz",
            "--model-factory", "nets_of_this_test:net")  # fmt: skip
    with pytest.raises(ModelError, match="--model-factory"):
        run("explain", "--expert", files / "e1" / "model.safetensors", "--data", files / "data.npz")
