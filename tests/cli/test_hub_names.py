"""Models named by the Hub are run where they were fetched to, whatever the command."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("huggingface_hub")
from language_toys import IDS, family
from storage.test_hub import COMMIT, Server

from mergewell.cli.main import main

BASE, ONE, TWO = (f"org/{name}@{COMMIT}" for name in ("base", "expert0", "expert1"))
MODELS = ["--base", BASE, "--expert", ONE, "--expert", TWO]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classifiers and 4 texts with labels."""
    folder = tmp_path_factory.mktemp("toys")
    family("bert classes", folder)
    arrays = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())}
    np.savez(folder / "data.npz", labels=np.array([0, 1, 0, 1]), **arrays)
    return folder


@pytest.fixture
def data(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folders = {f"org/{name}": toys / name for name in ("base", "expert0", "expert1")}
    with Server(folders) as found:
        threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        constants = importlib.import_module("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)  # where no folder is called org
        yield str(toys / "data.npz")
        found.shutdown()


def test_commands_that_run_models_take_names_of_the_hub(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on = ["--data", data]
    few = ["--samples", "4"]
    assert main(["check", *MODELS, *on, *few, "--json", "check.json"]) == 0
    assert json.loads(Path("check.json").read_text())["layers"]
    assert main(["calibrate", *MODELS, *on, *few, "--out", "c.safetensors"]) == 0
    assert main(["learn", "greedy_soup", *MODELS, *on, *few, "--out", "soup.yaml"]) == 0
    assert ONE in Path("soup.yaml").read_text()
    assert main(["tune", *MODELS, *on, *on, "--budget", "2", "--method", "task_arithmetic"]) == 0
    assert "no Hugging Face folder" not in capsys.readouterr().err
    assert main(["merge", *MODELS, "--out", "out"]) == 0
    assert main(["doctor", "out", *on, "--json"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "out", *MODELS, *on, "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert len(models) == 4
    assert main(["doctor", *MODELS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == ["the base", ONE, TWO]
