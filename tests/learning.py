"""What learners learn on in tests: recipes of small families, and inputs of their tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from families import factory, tiny_family
from torch import nn

from mergewell.descent.tasks import LearningTask
from mergewell.learners.base import Material
from mergewell.recipe import Recipe, make_recipe


def recipe_of(folder: Path, count: int) -> Recipe:
    """Write a family and return a recipe of it."""
    base, experts = tiny_family(folder, count)
    return make_recipe({"base": str(base), "experts": [{"path": str(path)} for path in experts]})


def tasks_of(count: int, *, labelled: bool = False) -> list[LearningTask]:
    """Return two batches of 16 inputs for each expert's task, maybe with labels at random."""
    generator = torch.Generator().manual_seed(3)
    return [
        LearningTask(
            k,
            [torch.randn(16, 4, generator=generator) for _ in range(2)],
            [torch.randint(3, (16,), generator=generator) for _ in range(2)] if labelled else (),
        )
        for k in range(count)
    ]


def material(count: int) -> Material:
    """Return what learners get that need no labels."""
    return Material(factory, tasks=tasks_of(count))


def distant(factory: Callable[[], nn.Module], count: int) -> Material:
    """Return two batches of 16 unlabelled inputs for each expert's task, each task apart."""
    generator = torch.Generator().manual_seed(3)
    tasks = [
        LearningTask(k, [3 * k + torch.randn(16, 4, generator=generator) for _ in range(2)])
        for k in range(count)
    ]
    return Material(factory, tasks=tasks)
