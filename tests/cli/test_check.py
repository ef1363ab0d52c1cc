"""`check` of what a recipe would merge: its rules, its calibration, its coefficients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import cnn, randomised
from safetensors.torch import save_file

from mergewell.cli.main import main


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Write a base, two experts and data into a folder and return it."""
    start = randomised(cnn(), 0, 0.1)
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        state = {
            n: t + 0.02 * seed * torch.rand(t.shape) if t.is_floating_point() else t
            for n, t in start.items()
        }
        save_file(state, tmp_path / f"{name}.safetensors")
    inputs = np.random.default_rng(0).normal(size=(16, 3, 16, 16)).astype("float32")
    np.savez(tmp_path / "data.npz", x=inputs)
    return tmp_path


def written(folder: Path, **more: Any) -> str:
    """Write a recipe beside the models; its paths are relative to it."""
    experts = [{"path": f"{name}.safetensors"} for name in ("one", "two")]
    recipe = {"base": "base.safetensors", "experts": experts, **more}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return str(folder / "recipe.yaml")


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["check", *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_rules_say_which_tensors_are_checked(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base", str(models / "base.safetensors")]
    for name in ("one", "two"):
        flags += ["--expert", str(models / f"{name}.safetensors")]
    plain = checked(capsys, written(models))
    assert plain["predictors"] == checked(capsys, *flags)["predictors"]
    rules = [{"match": "*.weight", "method": {"name": "keep", "model": 1}}]
    part = checked(capsys, written(models, rules=rules))
    assert part["experts"] == plain["experts"]
    assert part["predictors"]["relative_norm:one"] != plain["predictors"]["relative_norm:one"]


def test_layers_get_what_the_recipe_merges(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In mode merged a layer's input is made by the layers before, which rules decide on."""
    data = ["--data", str(models / "data.npz"), "--model-factory", "architectures:cnn"]
    plain = checked(capsys, written(models), *data)["layers"]
    rule = {"match": "*", "coefficients": [1.0, 0.0]}
    other = checked(capsys, written(models, rules=[rule]), *data)["layers"]
    assert [layer["layer"] for layer in other] == [layer["layer"] for layer in plain]
    differ = [a["relative"] != b["relative"] for a, b in zip(plain, other, strict=True)]
    assert not differ[0] and any(differ[1:])


def test_a_recipe_that_is_guided_is_checked(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, factory = written(models), ["--model-factory", "architectures:cnn"]
    data = ["--data", str(models / "data.npz")]
    made = str(models / "c.safetensors")
    assert main(["calibrate", recipe, *data, *factory, "--out", made]) == 0
    guided = written(models, calibration="c.safetensors", method={"name": "m_ties"})
    capsys.readouterr()
    assert main(["check", guided, *data, *factory]) == 0
    told = capsys.readouterr()
    assert "are guided by" in told.err and "warning: " in told.err
    assert main(["check", written(models, calibration="gone.safetensors")]) == 2
    assert "gone.safetensors" in capsys.readouterr().err


def test_a_recipe_and_flags_exclude_each_other(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", written(models), "--method", "ties"]) == 2
    assert "a recipe and --method exclude each other" in capsys.readouterr().err
