"""What the flags name: data for running models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mergewell.cli.given import read_data, refuse_flags
from mergewell.errors import RecipeError
from mergewell.recipe import make_recipe


def test_labels_are_no_input(tmp_path: Path) -> None:
    inputs = np.arange(10, dtype=np.float32).reshape(5, 2)
    np.savez(tmp_path / "labelled.npz", inputs=inputs, labels=np.arange(5))
    np.savez(tmp_path / "labels.npz", labels=np.arange(5))
    recipe = make_recipe({"base": "b", "experts": [{"path": "e"}]})

    def first(name: str) -> torch.Tensor:
        path = str(tmp_path / name)
        data = read_data(recipe, path, mode="merged", samples=5, model_factory="nets:make")
        batch = data.batches[0]
        assert isinstance(batch, torch.Tensor)
        return batch

    assert torch.equal(first("labelled.npz"), torch.from_numpy(inputs))
    assert first("labels.npz").tolist() == [0, 1, 2, 3, 4]  # a module may well be fed these


def test_flags_without_a_meaning_are_refused() -> None:
    refuse_flags({"--shard": None, "--resume": False}, "nothing is run")
    with pytest.raises(RecipeError, match="--seed: nothing is run, so"):
        refuse_flags({"--shard": None, "--seed": 0}, "nothing is run")
