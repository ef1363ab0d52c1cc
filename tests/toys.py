"""Small checkpoints that tests merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergewell.recipe import Recipe, make_recipe

SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (400, 200),
    "layer.0.weight": (300, 500),
    "layer.0.bias": (300,),
    "layer.1.weight": (64, 3, 5, 5),
    "scale": (),
}


def tensors(
    seed: int, *, size: float = 1.0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return random tensors, an integer one among them."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: (size * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in SHAPES.items()
    }
    return {**made, "steps": torch.tensor(7)}


def family(
    folder: Path, experts: int = 3, *, dtype: torch.dtype = torch.bfloat16, shards: int = 1
) -> tuple[Path, list[Path]]:
    """Write a base and experts near it; return their folders."""
    base = tensors(0)
    paths = [save(folder / "base", base, dtype, shards)]
    for index in range(experts):
        moved = tensors(index + 1, size=0.05)
        expert = {n: t + moved[n] if t.is_floating_point() else t for n, t in base.items()}
        paths.append(save(folder / f"expert{index}", expert, dtype, shards))
    return paths[0], paths[1:]


def save(
    folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16, shards: int = 1
) -> Path:
    """Write a checkpoint as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    if shards == 1:
        save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(cast)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index::shards]
        save_file({n: cast[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def recipe_of(
    base: Path, experts: Sequence[Path], method: Mapping[str, object], **more: object
) -> Recipe:
    """Return the recipe that merges these folders."""
    return make_recipe(
        {
            "base": str(base),
            "experts": [{"path": str(e)} for e in experts],
            "method": method,
            **more,
        }
    )
