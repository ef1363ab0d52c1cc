"""Concrete: the mask by hand, an open mask is task arithmetic, the loss falls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learning import material, recipe_of

from mergewell.learners.concrete import Concrete, SharedMask
from mergewell.plan import make_plan
from mergewell.recipe import MethodChoice
from mergewell.run import merge_tensors
from mergewell.tensor_group import TensorGroup


def test_the_mask_by_hand_is_shared_and_divided_by_its_mean() -> None:
    mask = SharedMask(0.0, temperature=0.5, seed=0)
    base = torch.zeros(2)
    group = TensorGroup("w", (torch.tensor([1.0, 2.0]), torch.tensor([-4.0, 8.0])), base, base)
    assert mask.start(group).tolist() == [0.0, 0.0]
    leaf = torch.tensor([0.5, -0.5])
    mask.settle()
    first, second = mask.adjusted(group, leaf).task_vectors
    high = 1 / (1 + torch.e**-1)  # sigmoid(0.5 / 0.5); the two sum to 1, their mean is 1/2
    torch.testing.assert_close(first, torch.tensor([2 * high, 4 * (1 - high)]))
    torch.testing.assert_close(second, torch.tensor([-8 * high, 16 * (1 - high)]))


def test_draws_are_seeded_and_new_at_each_step() -> None:
    base = torch.zeros(50)
    group = TensorGroup("w", (torch.ones(50),), torch.ones(1), base)
    mask, same = SharedMask(0.0, 0.5, seed=1), SharedMask(0.0, 0.5, seed=1)
    leaf = mask.start(group)
    (drawn,) = mask.adjusted(group, leaf).task_vectors
    assert torch.equal(drawn, mask.adjusted(group, leaf).task_vectors[0])
    assert torch.equal(drawn, same.adjusted(group, leaf).task_vectors[0])
    mask.advance()
    assert not torch.allclose(drawn, mask.adjusted(group, leaf).task_vectors[0])


@pytest.mark.parametrize("logit", [60.0, 0.0])
def test_an_open_or_even_mask_is_task_arithmetic(tmp_path: Path, logit: float) -> None:
    """With logit 60 every weight is kept with probability 1; steps of 1e-9 leave it there."""
    recipe = recipe_of(tmp_path, 2)
    learner = Concrete(steps=2, rate=1e-9, logit=logit, folder=str(tmp_path / "out"))
    found = dict(merge_tensors(make_plan(learner.learn(recipe, material(2)).recipe)))
    plain = recipe.model_copy(update={"method": MethodChoice(name="task_arithmetic", scale=0.3)})
    for name, tensor in merge_tensors(make_plan(plain)):
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_the_entropy_falls_and_the_coefficients_stay(tmp_path: Path) -> None:
    learner = Concrete(steps=60, rate=0.2, folder=str(tmp_path / "out"))
    learned = learner.learn(recipe_of(tmp_path, 3), material(3))
    assert learned.trials[0].score < learned.score < 0
    assert [expert.coefficient for expert in learned.recipe.experts] == [0.3] * 3
    assert "coefficients did not move" in learned.recipe.notes[-1]
    assert learner.learn(recipe_of(tmp_path, 3), material(3)).recipe == learned.recipe
