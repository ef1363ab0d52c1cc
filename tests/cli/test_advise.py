"""The command `advise`, as a function of the app."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mergewell.cli.main import main


def net() -> nn.Module:
    return nn.Linear(3, 2)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, two experts of which one has an earlier checkpoint, settings and labelled data."""
    torch.manual_seed(0)
    x = torch.randn(24, 3)
    y = (x[:, 0] > 0).long()
    module = net()
    places = {0: "base", 4: "e1/checkpoint-4", 40: "e1", 20: "e2"}
    for step in range(41):
        if step in places:
            folder = tmp_path / places[step]
            folder.mkdir(parents=True, exist_ok=True)
            save_file(module.state_dict(), folder / "model.safetensors")
        module.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        with torch.no_grad():
            for each in module.parameters():
                assert each.grad is not None
                each -= 0.5 * each.grad
    np.savez(tmp_path / "data.npz", inputs=x.numpy(), labels=y.numpy())
    (tmp_path / "s.yaml").write_text(
        "all: {learning_rate: 0.5, batch_size: 24, samples: 24, optimiser: sgd}\n"
        "experts: [{steps: 40}, {steps: 20}]\n"
    )
    made = ModuleType("net_of_advise")
    made.net = net  # pyright: ignore
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return tmp_path


def run(files: Path, *more: str) -> int:
    experts = [part for name in ("e1", "e2") for part in ("--expert", str(files / name))]
    return main(["advise", "--base", str(files / "base"), *experts, *more])


def test_each_source_adds_terms(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def known(*more: str) -> tuple[list[bool], dict[str, object]]:
        capsys.readouterr()
        assert run(files, "--json", "-", *more) == 0
        told = json.loads(capsys.readouterr().out)
        return [term["value"] is not None for term in told["terms"]], told

    assert known()[0] == [False, True, False, False]
    settings = ("--settings", str(files / "s.yaml"))
    assert known(*settings)[0] == [False, True, False, True]
    data = ("--data", str(files / "data.npz"), "--model-factory", "net_of_advise:net")
    held, told = known(*settings, *data)
    assert held == [True] * 4 and told["unit"] == "nats"
    assert told["early"][0]["expert"] == "e1"  # type: ignore[index]
    assert [c["step"] for c in told["early"][0]["checkpoints"]] == [4, "last"]  # type: ignore[index]
    assert told["early"][0]["best"] is not None  # type: ignore[index]


def test_what_is_printed(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = files / "advice.json"
    assert run(files, "--settings", str(files / "s.yaml"), "--json", str(out)) == 0
    told = capsys.readouterr().out
    for part in ("constants are loose", "The bound's terms", "Knobs", "Best knob: lower the"):
        assert part in told
    assert "add --data" in told.replace("\n", " ")  # of the earlier checkpoint
    assert json.loads(out.read_text())["version"] == 1
    assert run(files, "--json", str(out)) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_settings_alone_and_mistakes(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "--settings", str(files / "s.yaml")]) == 0
    assert "settings (rate × steps" in capsys.readouterr().out
    (files / "none.yaml").write_text("all: {steps: 3}")
    for arguments, sentence in (
        (["advise"], "Nothing is named to advise on"),
        (["advise", "--settings", str(files / "none.yaml")], "lists no expert"),
        (["advise", "--expert", str(files / "e1")], "name it with --base"),
        (["advise", "--base", "x", "--settings", str(files / "s.yaml")], "need experts"),
        (
            ["advise", "--base", str(files / "base"), "--expert", f"{files / 'e1'}:0.5"],
            "coefficient 0.5; drop it",
        ),
    ):
        assert main(arguments) == 2
        assert sentence in capsys.readouterr().err
