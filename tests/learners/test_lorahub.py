"""LoraHub: one expert by hand, the base is the start, adapters' order is no matter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import factory
from learning import recipe_of, tasks_of

from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError
from mergewell.learners.base import Material, judged
from mergewell.learners.lorahub import LoraHub
from mergewell.plan import make_plan
from mergewell.run import merge_tensors


def test_the_first_point_is_the_base_and_the_best_is_kept(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 2)
    learned = LoraHub(steps=25).learn(recipe, Material(factory, tasks=tasks_of(2, labelled=True)))
    assert len(learned.trials) == 25
    assert [e.coefficient for e in learned.trials[0].recipe.experts] == [0.0, 0.0]
    assert learned.score == max(trial.score for trial in learned.trials) > learned.trials[0].score
    assert [trial.score for trial in learned.trials if trial.kept] == [learned.score]
    assert all(abs(e.coefficient) <= 1.5 for t in learned.trials for e in t.recipe.experts)
    found = [expert.coefficient for expert in learned.recipe.experts]
    (kept,) = [trial for trial in learned.trials if trial.kept]
    assert [expert.coefficient for expert in kept.recipe.experts] == found


def test_the_score_is_loss_and_penalty_by_hand(tmp_path: Path) -> None:
    recipe, tasks = recipe_of(tmp_path, 2), tasks_of(2, labelled=True)
    learned = LoraHub(steps=6, penalty=0.2).learn(recipe, Material(factory, tasks=tasks))

    def loss(module: torch.nn.Module) -> float:
        with torch.no_grad():
            rows = torch.cat([module(batch) for task in tasks for batch in task.batches])
        labels = torch.cat([each for task in tasks for each in task.labels])
        return float(torch.nn.functional.cross_entropy(rows, labels))

    size = sum(abs(e.coefficient) for e in learned.recipe.experts) / 2
    by_hand = judged(learned.recipe, Material(factory), loss) + 0.2 * size
    assert -learned.score == pytest.approx(by_hand, rel=1e-5)


def test_labels_of_the_expert_bring_the_expert(tmp_path: Path) -> None:
    """One expert's own answers as labels: no point is better for them than far along its line."""
    recipe = recipe_of(tmp_path, 1)
    expert = factory()
    state = dict(merge_tensors(make_plan(recipe)))
    expert.load_state_dict(state)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(5))
    task = LearningTask(0, [x], [expert(x).argmax(-1)])
    learned = LoraHub(steps=30, penalty=0.0).learn(recipe, Material(factory, tasks=[task]))
    assert 0.5 < learned.recipe.experts[0].coefficient <= 1.5


def test_it_says_that_labels_are_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels for 0 of 2"):
        LoraHub().learn(recipe_of(tmp_path, 1), Material(factory, tasks=tasks_of(1)))
