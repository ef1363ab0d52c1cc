"""SyMerge: no step is its start, layers and coefficients move, the file gives a task its layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import factory
from learning import material, recipe_of, tasks_of
from torch import Tensor, nn

from mergewell.descent.task_layers import load_task_layer, read_task_layer
from mergewell.descent.tasks import LearningTask, loss, targets
from mergewell.errors import CheckpointError, DataError, RecipeError
from mergewell.learners.base import Learned, Material
from mergewell.learners.symerge import SyMerge
from mergewell.models.loader import load_state
from mergewell.plan import make_plan
from mergewell.recipe import MethodChoice, Recipe
from mergewell.run import merge_tensors


def merged_module(recipe: Recipe) -> nn.Module:
    module = factory()
    load_state(module, dict(merge_tensors(make_plan(recipe))))
    return module


def file_of(learned: Learned, folder: Path) -> Path:
    (path,) = folder.glob("*.layers.safetensors")
    assert str(path) in learned.recipe.notes[-1]
    return path


def test_without_a_step_it_is_task_arithmetic_with_the_experts_layers(tmp_path: Path) -> None:
    recipe, out = recipe_of(tmp_path, 2), tmp_path / "out"
    learner = SyMerge(steps=1, rate=1e-12, layer="2.*", folder=str(out))
    learned = learner.learn(recipe, material(2))
    plain = recipe.model_copy(update={"method": MethodChoice(name="task_arithmetic", scale=0.3)})
    started = dict(merge_tensors(make_plan(plain)))
    for name, tensor in merge_tensors(make_plan(learned.recipe)):
        torch.testing.assert_close(tensor, started[name])
    experts = make_plan(recipe).experts
    for number in (1, 2):
        own = read_task_layer(file_of(learned, out), number)
        assert {*own} == {"2.weight", "2.bias"}
        for name, tensor in own.items():
            torch.testing.assert_close(tensor, experts[number - 1][name])


def test_the_loss_falls_and_the_files_reproduce_it(tmp_path: Path) -> None:
    recipe, out, given = recipe_of(tmp_path, 2), tmp_path / "out", material(2)
    learner = SyMerge(steps=60, rate=0.02, layer="2.*", folder=str(out))
    learned = learner.learn(recipe, given)
    assert learned.trials[0].score < learned.score < 0
    path, plan = file_of(learned, out), make_plan(recipe)
    said = targets("expert", given.tasks, plan, factory)
    total, mismatched = 0.0, 0.0
    for number, task in enumerate(given.tasks, 1):
        for add, source in ((True, number), (False, 3 - number)):
            module = merged_module(learned.recipe)
            load_task_layer(module, path, source)
            with torch.no_grad():
                part = sum(
                    float(loss("expert", module(b), t)) / 4
                    for b, t in zip(task.batches, said[number - 1], strict=True)
                    if isinstance(b, Tensor)
                )
            total, mismatched = (total + part, mismatched) if add else (total, mismatched + part)
    # the note's number is the mean over the last 6 steps, each on one of the two batches
    assert total == pytest.approx(-learned.score, rel=0.15)
    assert mismatched > 2 * total
    alone = SyMerge(
        steps=60, rate=0.02, layer_rate=1e-12, layer="2.*", folder=str(out)
    ).learn(recipe, given)  # fmt: skip
    assert learned.score > alone.score


class Read(nn.Module):
    """A head outside of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.eye(3))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.prototypes


def test_heads_outside_are_copied_and_learned(tmp_path: Path) -> None:
    heads = [Read(), Read()]
    tasks = [
        LearningTask(task.expert, task.batches, (), head)
        for task, head in zip(tasks_of(2), heads, strict=True)
    ]
    out = tmp_path / "out"
    learned = SyMerge(steps=20, rate=0.02, folder=str(out)).learn(
        recipe_of(tmp_path, 2), Material(factory, tasks=tasks)
    )
    assert learned.trials[0].score < learned.score
    assert torch.equal(heads[0].prototypes, torch.eye(3))
    own = [read_task_layer(file_of(learned, out), k)["head.prototypes"] for k in (1, 2)]
    assert not torch.allclose(own[0], torch.eye(3)) and not torch.allclose(*own)
    with pytest.raises(CheckpointError, match="no layer of task 3"):
        read_task_layer(file_of(learned, out), 3)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    recipe, folder = recipe_of(tmp_path, 2), str(tmp_path)
    with pytest.raises(RecipeError, match="folder=DIR"):
        SyMerge().learn(recipe, material(2))
    with pytest.raises(DataError, match="layer=PATTERN"):
        SyMerge(folder=folder).learn(recipe, material(2))
    with pytest.raises(DataError, match=r"matches layer=head\.\*"):
        SyMerge(folder=folder, layer="head.*").learn(recipe, material(2))
