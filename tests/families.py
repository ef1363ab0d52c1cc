"""Small families of models to learn on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def factory() -> nn.Module:
    """Return a classifier of 4 numbers, whose last layer stands for a head nobody trained."""
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5), nn.Linear(5, 3, bias=False)
    ).eval()


def tiny_family(folder: Path, count: int = 3, size: float = 0.5) -> tuple[Path, list[Path]]:
    """Write a base and experts that differ from it in all but the last layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = factory().state_dict()
        paths = [folder / "base.safetensors"]
        save_file(base, paths[0])
        for number in range(count):
            state = {
                name: t if name.startswith("3.") else t + size * torch.randn_like(t)
                for name, t in base.items()
            }
            paths.append(folder / f"{number}.safetensors")
            save_file(state, paths[-1])
    return paths[0], paths[1:]
