"""Activations above a budget lie in files that nobody can find afterwards."""

import gc
from pathlib import Path

import pytest
import torch

from mergewell.errors import OutputError
from mergewell.models.spill import SMALLEST, Spill


def large(seed: int) -> torch.Tensor:
    return torch.randn(4, SMALLEST // 8, generator=torch.Generator().manual_seed(seed))


def test_values_and_layout_are_kept_and_the_folder_goes(tmp_path: Path) -> None:
    wide = torch.randn(2, 8, 64, 64).contiguous(memory_format=torch.channels_last)
    tree = {"a": wide, "b": (large(0).T, torch.arange(SMALLEST), 3, None)}
    with Spill(0, tmp_path) as spill:
        kept = spill.keep(tree)
        assert len(list(tmp_path.iterdir())) == 1
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []  # unlinked
        assert torch.equal(kept["a"], wide) and kept["a"].stride() == wide.stride()
        assert torch.equal(kept["b"][0], tree["b"][0])
        assert torch.equal(kept["b"][1], tree["b"][1]) and kept["b"][2:] == (3, None)
        assert kept["a"].data_ptr() != wide.data_ptr()
        assert spill.spilled == wide.nbytes + large(0).nbytes + 8 * SMALLEST
        kept["a"] += 1  # the network may write in place
        assert torch.equal(kept["a"], wide + 1)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(kept["a"], wide + 1)  # the mapping lives as long as the tensor


def test_the_budget_counts_what_is_still_in_use(tmp_path: Path) -> None:
    size = large(0).nbytes
    with Spill(2 * size, tmp_path) as spill:
        first, second = spill.keep([large(0), large(1)])
        assert spill.held == 2 * size and spill.spilled == 0
        third = spill.keep(large(2))
        assert spill.spilled == size
        del first
        gc.collect()
        fourth = spill.keep(large(3))
        assert spill.spilled == size and spill.held == 2 * size
        small = spill.keep(torch.ones(3))  # not worth a file
        assert spill.spilled == size
        del second, third, fourth, small


def test_a_folder_that_cannot_hold_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"), Spill(0, tmp_path / "nowhere") as spill:
        spill.keep(large(0))
