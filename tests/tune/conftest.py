"""A base of zeros and two experts that read different halves of the input: they add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergewell.recipe import Recipe, make_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    generator = torch.Generator().manual_seed(0)
    save_file({"weight": torch.zeros(3, 4)}, tmp_path / "base.safetensors")
    for place in range(2):
        weight = torch.zeros(3, 4)
        weight[:, 2 * place : 2 * place + 2] = torch.randn(3, 2, generator=generator)
        save_file({"weight": weight}, tmp_path / f"{place}.safetensors")
    return make_recipe(
        {
            "base": str(tmp_path / "base.safetensors"),
            "experts": [{"path": str(tmp_path / f"{place}.safetensors")} for place in range(2)],
        }
    )
