"""Evidence about two experts, the least that diagnostics are given."""

from __future__ import annotations

import pytest
import torch

from mergewell.diagnostics.base import Evidence


@pytest.fixture(autouse=True)
def _one_thread():
    """Keep small operations from waiting for one another where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plain() -> Evidence:
    """Base (3, 4), task vectors (0.3, 0.4) and (0, -1), nothing else measured."""
    products = [[25.0, 2.5, -4.0], [2.5, 0.25, -0.4], [-4.0, -0.4, 1.0]]
    return Evidence(
        experts=("a", "b"),
        products={"w": torch.tensor(products, dtype=torch.float64)},
        conflict_mass={"w": torch.tensor([0.9, 1.7])},
        conflict_pairs={"w": torch.tensor([[[0.0, 0.4], [0.4, 0.0]], [[0.25, 0.4], [0.4, 1.0]]])},
    )
