"""Hashes made by the reads of others are those of the files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergewell.errors import CheckpointError
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import hash_file
from mergewell.storage.passing_hash import PassingHash, hash_while_reading


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergewell.storage.passing_hash._STEP", 1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    state = {f"t{i}": torch.arange(1000.0) + i for i in range(20)}
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("names", [range(20), range(19, -1, -1), [3, 17, 3, 4], []])
def test_reads_in_any_order_give_the_hash_of_the_file(file: Path, names: list[int]) -> None:
    checkpoint = open_checkpoint(file)
    (passing,) = hash_while_reading([checkpoint])
    for name in names:
        checkpoint.read(f"t{name}", 100, 900)
    record = passing.record()
    assert (record.path, record.hash) == (str(file), hash_file(file))
    assert record.bytes == file.stat().st_size


def test_reads_carry_the_hash_along(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    (passing,) = hash_while_reading([checkpoint])
    names = list(checkpoint)
    checkpoint.read(names[0])
    first = passing.position
    assert first == file.stat().st_size - 20 * 4000, "what stands before is the header"
    checkpoint.read(names[1])
    assert passing.position == first + 4000, "and with it the first tensor"
    checkpoint.read(names[0])
    assert passing.position == first + 4000
    checkpoint.read(names[-1])
    assert passing.position == file.stat().st_size - 4000


def test_readers_far_ahead_are_not_followed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergewell.storage.passing_hash._WINDOW", 10_000)
    checkpoint = open_checkpoint(file)
    (passing,) = hash_while_reading([checkpoint])
    checkpoint.read(list(checkpoint)[-1])
    assert passing.position == 0
    assert passing.record().hash == hash_file(file)


def test_many_threads_give_the_hash_of_the_file(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    (passing,) = hash_while_reading([checkpoint], "sha256")
    blocks = [(name, start) for name in checkpoint for start in range(0, 1000, 10)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda block: checkpoint.read(block[0], block[1], block[1] + 10), blocks))
    assert passing.record().hash == hash_file(file, "sha256")


def test_a_file_that_is_touched_or_removed_is_an_error(file: Path) -> None:
    passing = PassingHash(file)
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while it was merged"):
        passing.record()
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        passing.record()


def test_jobs_share_the_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path in paths:
        save_file({"a": torch.ones(2)}, path)
    opened = [open_checkpoint(path) for path in paths]
    assert [h.path for h in hash_while_reading([*opened, opened[0]])] == paths
    assert hash_while_reading(opened, part=1, parts=2) == ()  # each checkpoint has one file
    assert [h.path for h in hash_while_reading(opened, known=paths[:2])] == paths[2:]
