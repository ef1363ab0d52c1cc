"""DF-Merge: the weighting by hand, one expert is a point on its line, the recipe makes the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import factory
from learning import recipe_of, tasks_of
from torch import nn

from mergewell.descent.dynamic_fisher import DynamicFisher
from mergewell.descent.merge import LearnedMerge
from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError, RecipeError
from mergewell.learners.base import Material, judged
from mergewell.learners.df_merge import DfMerge
from mergewell.models.fisher import squared_gradients
from mergewell.recipe import MethodChoice, Recipe


def metric_of(tasks: list[LearningTask]) -> Any:
    def accuracy(module: nn.Module) -> float:
        with torch.no_grad():
            right = [
                (module(x).argmax(-1) == y).double().mean()
                for task in tasks
                for x, y in zip(task.batches, task.labels, strict=True)
            ]
        return float(torch.stack(right).mean())

    return accuracy


def by_task(recipe: Recipe) -> LearnedMerge:
    plain = MethodChoice(name="task_arithmetic", scale=1.0)  # pyright: ignore
    return LearnedMerge(recipe.model_copy(update={"method": plain}), factory(), per="task")


def test_the_weighting_is_that_of_the_formula(tmp_path: Path) -> None:
    recipe, tasks = recipe_of(tmp_path, 2), tasks_of(2)
    merge, point = by_task(recipe), torch.tensor([0.4, 0.9], dtype=torch.float64)
    DynamicFisher(merge, tasks, 5, seed=7).place(point)
    base = {name: merge.plan.reference[name] for name in ("0.weight", "2.bias")}
    for name, start in base.items():
        taus = [expert[name] - start for expert in merge.plan.experts]
        fishers: list[torch.Tensor] = []
        for k, task in enumerate(tasks):
            module = factory()
            state = module.state_dict()
            for key in state:
                plain = merge.plan.reference[key]
                state[key] = plain + float(point[k]) * (merge.plan.experts[k][key] - plain)
            module.load_state_dict(state)
            batch = task.batches[0]
            assert isinstance(batch, torch.Tensor)
            squares = squared_gradients(module, batch[:5], "classes", first=0, seed=7)
            fishers.append(squares[name] / 5 + 1e-12)
        top = sum(f * float(c) * tau for f, c, tau in zip(fishers, point, taus, strict=True))
        expected = start + 2 * top / (fishers[0] + fishers[1])
        found = merge.module.state_dict()[name]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_recipe_makes_the_best_point_s_merge(tmp_path: Path) -> None:
    recipe, tasks = recipe_of(tmp_path, 2), tasks_of(2, labelled=True)
    metric = metric_of(tasks)
    learner = DfMerge(random=3, steps=4, samples=3, bound=0.6, folder=str(tmp_path / "out"))
    learned = learner.learn(recipe, Material(factory, metric, tasks))
    assert len(learned.trials) == 8
    assert learned.score == max(trial.score for trial in learned.trials)
    assert judged(learned.recipe, Material(factory), metric) == learned.score
    assert all(0 <= expert.coefficient <= 0.6 for expert in learned.recipe.experts)
    tried = [e.coefficient for trial in learned.trials for e in trial.recipe.experts]
    assert max(tried) > 0.3
    again = learner.learn(recipe, Material(factory, metric, tasks))
    assert again.recipe == learned.recipe


def test_one_expert_is_a_point_on_its_line(tmp_path: Path) -> None:
    merge, point = by_task(recipe_of(tmp_path, 1)), torch.tensor([0.7], dtype=torch.float64)
    DynamicFisher(merge, tasks_of(1), 2, seed=0).place(point)
    for name, tensor in merge.module.state_dict().items():
        start, end = merge.plan.reference[name], merge.plan.experts[0][name]
        torch.testing.assert_close(tensor, start + 0.7 * (end - start), rtol=1e-5, atol=1e-6)


def test_an_order_of_experts_is_no_matter(tmp_path: Path) -> None:
    recipe, tasks = recipe_of(tmp_path, 2), tasks_of(2)
    point = torch.tensor([0.4, 0.9], dtype=torch.float64)
    there, here = (
        by_task(recipe),
        by_task(recipe.model_copy(update={"experts": recipe.experts[::-1]})),
    )
    DynamicFisher(there, tasks, 4, seed=0).place(point)
    turned = [LearningTask(1 - (task.expert or 0), task.batches) for task in tasks]
    DynamicFisher(here, turned, 4, seed=0).place(point.flip(0))
    for name, tensor in there.module.state_dict().items():
        torch.testing.assert_close(here.module.state_dict()[name], tensor)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    recipe, tasks = recipe_of(tmp_path, 2), tasks_of(2)
    with pytest.raises(DataError, match="labelled"):
        DfMerge().learn(recipe, Material(factory, tasks=tasks))
    with pytest.raises(RecipeError, match="folder=DIR"):
        DfMerge().learn(recipe, Material(factory, lambda _: 0.0, tasks))
    with pytest.raises(DataError, match="for each expert by itself"):
        DfMerge(folder=str(tmp_path)).learn(recipe, Material(factory, lambda _: 0.0, tasks[:1]))
