"""AdaMerging: the entropy goes down, the recipe carries the coefficients, SAM is a step wider."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import factory, tiny_family

from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError
from mergewell.learners.adamerging import AdaMerging
from mergewell.learners.base import LEARNERS, Material
from mergewell.learners.samerging import SaMerging
from mergewell.recipe import Recipe, make_recipe


def recipe_of(folder: Path, count: int) -> Recipe:
    base, experts = tiny_family(folder, count)
    return make_recipe({"base": str(base), "experts": [{"path": str(path)} for path in experts]})


def material(count: int) -> Material:
    generator = torch.Generator().manual_seed(3)
    tasks = [
        LearningTask(k, [torch.randn(16, 4, generator=generator) for _ in range(2)])
        for k in range(count)
    ]
    return Material(factory, tasks=tasks)


def test_adamerging_lowers_the_entropy_and_writes_a_rule_a_tensor(tmp_path: Path) -> None:
    learned = AdaMerging(steps=40, rate=0.05).learn(recipe_of(tmp_path, 2), material(2))
    assert learned.trials[0].score < learned.score < 0
    assert {rule.match for rule in learned.recipe.rules} == {
        "0.weight", "0.bias", "2.weight", "2.bias"
    }  # fmt: skip
    assert "entropy loss" in learned.recipe.notes[-1]
    again = AdaMerging(steps=40, rate=0.05).learn(recipe_of(tmp_path, 2), material(2))
    assert again.recipe == learned.recipe


def test_by_task_the_coefficients_are_the_experts(tmp_path: Path) -> None:
    learned = AdaMerging(steps=5, per="task").learn(recipe_of(tmp_path, 3), material(3))
    assert learned.recipe.rules == ()
    found = [expert.coefficient for expert in learned.recipe.experts]
    assert all(value != 0.3 for value in found)
    # Adam's first steps are of the size of the learning rate
    assert all(abs(value - 0.3) <= 5 * 1.01e-3 for value in found)


def test_samerging_of_one_expert_finds_that_expert(tmp_path: Path) -> None:
    learner = SaMerging(steps=150, rate=0.05, decay=0.0, per="task")
    learned = learner.learn(recipe_of(tmp_path, 1), material(1))
    assert learned.recipe.experts[0].coefficient == pytest.approx(1.0, abs=0.02)
    assert learned.score == pytest.approx(0.0, abs=1e-3)


def test_the_radius_changes_what_is_found(tmp_path: Path) -> None:
    plain = SaMerging(steps=10, rate=0.05, radius=0.0).learn(recipe_of(tmp_path, 2), material(2))
    sharp = SaMerging(steps=10, rate=0.05, radius=1.0).learn(recipe_of(tmp_path, 2), material(2))
    assert plain.recipe.rules != sharp.recipe.rules


def test_without_tasks_it_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="each expert's task"):
        LEARNERS.build("adamerging", {}).learn(recipe_of(tmp_path, 2), Material(factory))
