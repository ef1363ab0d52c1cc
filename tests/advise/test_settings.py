"""Settings: a user's file first, then what trainers leave beside checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergewell.advise.settings import Sourced, known_of, read_settings
from mergewell.errors import CheckpointError, DataError

CARD = """
### Training hyperparameters
- learning_rate: 2e-05
- train_batch_size: 8
- total_train_batch_size: 32
- optimizer: Use adamw_torch with betas=(0.9,0.999)
- num_epochs: 3.0
"""


def state(folder: Path, **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = [
        {"step": 10, "loss": 2.5, "learning_rate": 1e-5},
        {"step": 90, "loss": 0.5, "learning_rate": 1e-6},
        {"step": 90, "train_runtime": 12.0},
    ]
    text = json.dumps({"global_step": 90, "epoch": 3.0, "log_history": log, **more})
    (folder / "trainer_state.json").write_text(text)
    return folder


def test_the_file_comes_before_what_lies_beside(tmp_path: Path) -> None:
    one, two = state(tmp_path / "one"), tmp_path / "two"
    (one / "README.md").write_text(CARD)
    (one / "checkpoint-30").mkdir()
    two.mkdir()
    file = tmp_path / "settings.yaml"
    file.write_text(
        "all: {batch_size: 16, optimiser: sgd}\n"
        "experts: {two: {steps: 7, learning_rate: 1e-3, checkpoints: {3: early}}}\n"
    )
    first, second = known_of(["one", "two"], [one, two], file)
    assert first.numbers["learning_rate"] == Sourced(1e-5, "one/trainer_state.json")
    assert first.numbers["loss"].value == 0.5 and first.numbers["start_loss"].value == 2.5
    assert first.numbers["batch_size"] == Sourced(16.0, "settings.yaml")
    assert first.numbers["samples"] == Sourced(90 * 16 / 3, "steps × batch size / epochs")
    assert first.checkpoints == {30: str(one / "checkpoint-30")}
    assert second.value("steps") == 7 and second.value("samples") is None
    assert second.value("learning_rate") == 1e-3 and second.optimiser == "sgd"
    assert second.checkpoints == {3: str(tmp_path / "early")}


def test_a_model_card_gives_the_whole_batch(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    (known,) = known_of(["x"], [tmp_path], None)
    assert known.value("batch_size") == 32 and known.value("epochs") == 3
    assert known.numbers["learning_rate"].source == f"{tmp_path.name}/README.md"


def test_steps_follow_from_epochs(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text('{"experts": [{"epochs": 2, "samples": 100, "batch_size": 8}]}')
    (known,) = known_of((), (), file)
    assert known.value("steps") == 25


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("experts: [{learning_rte: 1}]", "no setting 'learning_rte': did you mean 'learning_rate'"),
        ("expert: []", "no setting 'expert': did you mean 'experts'"),
        ("experts: [{steps: -1}]", "steps = -1 is refused"),
        ("experts: {z: {steps: 1}}", "no expert is called 'z'"),
        ("experts: [{steps: 1}, {steps: 2}]", "settings of 2 experts, but 1 are named"),
        ("just words", "holds no settings"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(DataError, match=told) as caught:
        known_of(["x"], [None], file)
    assert "s.yaml" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the settings"):
        read_settings(tmp_path / "missing.yaml")
    (tmp_path / "trainer_state.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is not a JSON object"):
        known_of(["x"], [tmp_path], None)
