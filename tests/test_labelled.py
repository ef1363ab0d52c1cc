"""Labelled inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mergewell.errors import DataError
from mergewell.labelled import LabelledInputs, accuracy, cut, halves, load_labelled


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # pyright: ignore
    return path


def test_labels_are_taken_out_of_the_inputs(tmp_path: Path) -> None:
    labels = np.arange(10) % 3
    one = load_labelled(save(tmp_path / "a.npz", images=np.ones((10, 2)), labels=labels))
    assert isinstance(one.batches[0], torch.Tensor)
    assert one.labels is not None and one.labels.tolist() == labels.tolist()
    two = load_labelled(
        save(tmp_path / "b.npz", a=np.ones((10, 2)), b=np.ones(10), labels=labels), limit=5
    )
    assert isinstance(two.batches[0], dict) and set(two.batches[0]) == {"a", "b"}
    assert two.labels is not None and two.labels.tolist() == labels[::2].tolist()
    three = load_labelled(save(tmp_path / "c.npz", images=np.ones((10, 2))))
    assert three.labels is None and three.samples == 10


def test_batches_differ_by_one_sample_at_most() -> None:
    data = cut(torch.zeros(129, 2), None, 128)
    assert [len(batch) for batch in data.batches] == [65, 64]
    assert [len(b) for b in cut(torch.zeros(5, 2), None, 128).batches] == [5]


def test_halves_are_the_even_and_odd_places() -> None:
    data = cut(torch.arange(7)[:, None], torch.arange(7), 3)
    even, odd = halves(data)
    assert torch.cat(list(even.batches)).flatten().tolist() == [0, 2, 4, 6]  # pyright: ignore
    assert odd.labels is not None and odd.labels.tolist() == [1, 3, 5]
    with pytest.raises(DataError, match="3 samples cannot be split"):
        halves(cut(torch.zeros(3, 1), None, 2))


def test_accuracy_by_hand() -> None:
    data = LabelledInputs((torch.eye(2), torch.eye(2)), torch.tensor([0, 1, 0, 0]))
    assert accuracy(nn.Identity(), data) == 0.75
    with pytest.raises(DataError, match="needs labelled data"):
        accuracy(nn.Identity(), LabelledInputs((torch.eye(2),)))
    with pytest.raises(DataError, match="one row of logits"):
        accuracy(nn.Flatten(0), LabelledInputs((torch.eye(2),), torch.tensor([0, 1])))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.ones((3, 2)), "labels": np.ones(3)}, "whole numbers from 0"),
        ({"images": np.ones((3, 2)), "labels": np.array([0, -1, 1])}, "whole numbers from 0"),
        ({"images": np.ones((3, 2)), "labels": np.ones((3, 2), int)}, "whole numbers from 0"),
    ],
)
def test_labels_that_cannot_be_used(
    tmp_path: Path, arrays: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_labelled(save(tmp_path / "a.npz", **arrays))
