"""Learned weights that no coefficient describes: written as a checkpoint, and the recipe of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mergewell.errors import OutputError, RecipeError
from mergewell.plan import Plan
from mergewell.recipe import Expert, MethodChoice, Recipe
from mergewell.storage.durable import write_durably, writing
from mergewell.storage.header import build_header
from mergewell.storage.manifest import new_hasher
from mergewell.storage.spec import TensorSpec

LEARNED_FROM = "mergewell.learned_from"
"""Key of a file's metadata: the recipe whose models taught the weights."""


def require_folder(recipe: Recipe, folder: str, learner: str) -> None:
    """Require a place for what a learner writes, before anything is learned.

    Raises:
        RecipeError: no folder is named, or models are stacks of layers.
        OutputError: the folder cannot be made.
    """
    if not folder:
        raise RecipeError(
            f"{learner} writes what it learned to a file; name a folder for it with "
            "--set folder=DIR."
        )
    if recipe.base_layers or any(expert.layers for expert in recipe.experts):
        raise RecipeError(
            f"{learner} cannot learn on models that are stacked from layers; merge the stack first."
        )
    if Path(folder).exists() and not Path(folder).is_dir():
        raise OutputError(f"{folder} is a file; name a folder for what {learner} writes.")
    with writing(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)


def write_weights(
    plan: Plan, weights: Mapping[str, Tensor], folder: str | Path, learner: str
) -> Path:
    """Write a model in one file, in the dtypes that the plan's merge has, and return its path.

    The name tells the content: the same weights go to the same file.

    Raises:
        OutputError: it cannot be written.
    """
    stored = {
        name: weights[name].detach().to(task.spec.dtype).contiguous()
        for name, task in plan.tasks.items()
    }
    hasher = new_hasher("xxh3-128")
    for name, tensor in stored.items():
        hasher.update(name.encode())
        hasher.update(content(tensor))
    path = Path(folder).resolve() / f"{learner}-{hasher.hexdigest()[:12]}.safetensors"
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()]
    header, _ = build_header(specs, {"format": "pt", LEARNED_FROM: plan.recipe.to_yaml()})
    write_durably(path, header + b"".join(content(tensor) for tensor in stored.values()))
    return path


def of_weights(recipe: Recipe, path: Path) -> Recipe:
    """Return the recipe of a written model alone: it gives these weights, bit for bit."""
    omitted = [r.model_copy(update={"coefficients": None}) for r in recipe.rules if r.omit]
    return recipe.model_copy(
        update={
            "experts": (Expert(path=str(path)),),
            "method": MethodChoice(name="average"),
            "rules": (*omitted,),
            "calibration": None,
            "repair": None,
        }
    )


def content(tensor: Tensor) -> bytes:
    """Return a tensor's bytes, as a file of weights holds them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
