"""The command `learn`, as a function of an app."""

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

from mergewell.cli.learn import learn
from mergewell.errors import DataError, OutputError, RecipeError
from mergewell.recipe import read_recipe

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(learn)


def net() -> nn.Module:
    return nn.Linear(2, 2, bias=False)


def run(*arguments: str | Path) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    """An expert that is right and one that is always wrong."""
    for name, sign in (("right", 1.0), ("wrong", -2.0)):
        save_file({"weight": sign * torch.eye(2)}, tmp_path / f"{name}.safetensors")
    np.savez(tmp_path / "data.npz", x=np.eye(2, dtype=np.float32), labels=np.array([0, 1]))
    np.savez(tmp_path / "unlabelled.npz", x=np.eye(2, dtype=np.float32))
    module = ModuleType("nets_of_this_test")
    module.net = net  # pyright: ignore
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return ["greedy_soup", "--expert", tmp_path / "wrong.safetensors", "--expert",
            tmp_path / "right.safetensors", "--model-factory", "nets_of_this_test:net"]  # fmt: skip


def test_the_recipe_is_printed_or_written(
    flags: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*flags, "--data", tmp_path / "data.npz", "--out", tmp_path / "recipe.yaml")
    told = capsys.readouterr()
    assert "kept 1 of 2 experts" in told.err
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert [Path(expert.path).stem for expert in recipe.experts] == ["right"]
    run(*flags, "--data", tmp_path / "data.npz")
    assert capsys.readouterr().out.strip() == (tmp_path / "recipe.yaml").read_text().strip()
    with pytest.raises(OutputError, match="exists already"):
        run(*flags, "--data", tmp_path / "data.npz", "--out", tmp_path / "recipe.yaml")


def test_json_tells_every_trial(
    flags: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*flags, "--data", tmp_path / "data.npz", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["learner"], found["score"]) == (1, "greedy_soup", 1.0)
    assert [trial["score"] for trial in found["trials"]] == [0.0, 1.0, 0.0]
    assert [trial["kept"] for trial in found["trials"]] == [False, True, False]


def test_mistakes_are_sentences(flags: list[str | Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give labelled data"):
        run(*flags, "--data", tmp_path / "unlabelled.npz")
    with pytest.raises(RecipeError, match="no parameter 'x'"):
        run(*flags, "--set", "x=1")
    with pytest.raises(RecipeError, match="write it as key=value"):
        run(*flags, "--set", "x")
    with pytest.raises(RecipeError, match="no learner 'soup'"):
        run("soup", *flags[1:])
