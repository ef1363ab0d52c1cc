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
from safetensors.torch import load_file, save_file
from torch import nn

from mergewell.cli.learn import learn
from mergewell.errors import DataError, OutputError, RecipeError
from mergewell.plan import make_plan
from mergewell.recipe import read_recipe
from mergewell.run import merge_tensors

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


def layered() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    """A base, three experts around it and unlabelled inputs of each one's task."""
    torch.manual_seed(0)
    base = layered().state_dict()
    save_file(base, tmp_path / "base.safetensors")
    found: list[str | Path] = ["--base", tmp_path / "base.safetensors"]
    for place in range(3):
        state = {name: t + torch.randn_like(t) for name, t in base.items()}
        save_file(state, tmp_path / f"{place}.safetensors")
        found += ["--expert", tmp_path / f"{place}.safetensors"]
        rows = place + np.random.default_rng(place).normal(size=(20, 3)).astype("float32")
        np.savez(tmp_path / f"{place}.npz", x=rows)
    module = ModuleType("nets_of_this_test")
    module.layered = layered  # pyright: ignore
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return [*found, "--model-factory", "nets_of_this_test:layered"]


def test_coefficients_by_m_loss_are_learned_from_unlabelled_inputs(
    toys: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "recipe.yaml"
    run("m_loss_coefficients", *toys, "--data", tmp_path / "0.npz", "--out", out)
    assert "discrepancy to the ensemble reference" in capsys.readouterr().err
    recipe = read_recipe(out)
    assert {rule.match for rule in recipe.rules} == {"0.weight", "0.bias"}
    coefficients = recipe.rules[0].coefficients
    assert coefficients is not None and sum(coefficients) == pytest.approx(1)
    assert len({round(c, 4) for c in coefficients}) > 1
    merged = dict(merge_tensors(make_plan(recipe)))
    by_hand = sum(
        c * load_file(tmp_path / f"{i}.safetensors")["0.weight"].double()
        for i, c in enumerate(coefficients)
    )
    assert torch.allclose(merged["0.weight"].double(), by_hand, atol=1e-6)


def test_inputs_of_each_expert_route_to_it(
    toys: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [part for i in range(3) for part in ("--data", tmp_path / f"{i}.npz")]
    routed = ["--set", "reference=routed", "--samples", "30", "--json"]
    run("m_loss_coefficients", *toys, *data, *routed)
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 30
    assert "the routed reference" in found["recipe"]["notes"][0]
    with pytest.raises(DataError, match="needs to know each batch's own expert"):
        run("m_loss_coefficients", *toys, *data[:2], *routed)
    with pytest.raises(DataError, match="2 paths of data are named for 3 experts"):
        run("m_loss_coefficients", *toys, *data[:4], *routed)
    with pytest.raises(DataError, match="5 samples are too few for 3 experts"):
        run("m_loss_coefficients", *toys, *data, "--samples", "5")


def test_labels_of_several_files_are_put_together(
    flags: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", tmp_path / "data.npz"]
    run(*flags, *data, *data, "--json")
    assert json.loads(capsys.readouterr().out)["samples"] == 4
    with pytest.raises(DataError, match="give labelled data"):
        run(*flags, *data, "--data", tmp_path / "unlabelled.npz")
    with pytest.raises(DataError, match="No inputs are named"):
        run(*flags)


def test_mistakes_are_sentences(flags: list[str | Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give labelled data"):
        run(*flags, "--data", tmp_path / "unlabelled.npz")
    with pytest.raises(RecipeError, match="no parameter 'x'"):
        run(*flags, "--set", "x=1")
    with pytest.raises(RecipeError, match="write it as key=value"):
        run(*flags, "--set", "x")
    with pytest.raises(RecipeError, match="no learner 'soup'"):
        run("soup", *flags[1:])
