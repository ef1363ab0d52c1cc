"""AdaRank: masks by hand, all kept is the very expert, the recipe makes what was learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import factory
from learning import material, recipe_of

from mergewell.descent.adjustment import write_expert
from mergewell.descent.merge import LearnedMerge
from mergewell.errors import RecipeError
from mergewell.learners.adamerging import AdaMerging
from mergewell.learners.adarank import AdaRank, RankMasks
from mergewell.plan import make_plan
from mergewell.run import merge_tensors
from mergewell.tensor_group import TensorGroup


def group_of(*task_matrices: torch.Tensor) -> TensorGroup:
    base = torch.ones_like(task_matrices[0])
    return TensorGroup("w", tuple(base + t for t in task_matrices), torch.ones(2), base)


def test_a_direction_goes_with_its_logit_and_its_gradient_by_hand() -> None:
    masks = RankMasks(density=1.0, temperature=10.0)
    tau = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    group = group_of(tau, 2 * tau)
    leaf = masks.start(group)
    assert leaf is not None and leaf.shape == (2, 3) and bool((leaf == 0.1).all())
    leaf[0, 1] = -0.2
    leaf.requires_grad_()
    first, second = masks.adjusted(group, leaf).task_vectors
    torch.testing.assert_close(first, torch.diag(torch.tensor([3.0, 0.0, 1.0])))
    assert torch.equal(second, group.task_vectors[1])
    first.sum().backward()
    assert leaf.grad is not None
    # d/dlogit of s sigmoid(logit / 10), whatever the hard mask says
    slopes = [torch.tensor(x / 10).sigmoid() * torch.tensor(-x / 10).sigmoid() / 10
              for x in (0.1, -0.2, 0.1)]  # fmt: skip
    torch.testing.assert_close(leaf.grad[0], torch.tensor([3.0, 2.0, 1.0]) * torch.stack(slopes))
    assert not bool(leaf.grad[1].any())


def test_density_keeps_the_longest_at_the_beginning() -> None:
    masks = RankMasks(density=0.5, temperature=10.0)
    leaf = masks.start(group_of(torch.diag(torch.tensor([1.0, 4.0, 3.0, 2.0])), torch.eye(4)))
    assert leaf is not None and (leaf > 0).tolist() == [[True, True, False, False]] * 2
    assert masks.start(group_of(torch.ones(4), torch.ones(4))) is None


def test_without_a_flip_it_is_adamerging(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 2)
    plain = AdaMerging(steps=8, rate=0.02).learn(recipe, material(2))
    learner = AdaRank(steps=8, rate=0.02, mask_rate=1e-6, folder=str(tmp_path / "out"))
    ranked = learner.learn(recipe, material(2))
    assert "Of 18 singular directions 18 are kept" in ranked.recipe.notes[-1]
    for ours, theirs in zip(ranked.recipe.rules, plain.recipe.rules, strict=True):
        assert ours.match == theirs.match
        assert ours.coefficients == pytest.approx(theirs.coefficients, abs=1e-6)
    merged = dict(merge_tensors(make_plan(ranked.recipe)))
    for name, tensor in merge_tensors(make_plan(plain.recipe)):
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_masks_flip_the_entropy_falls_and_the_recipe_makes_what_was_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[LearnedMerge] = []
    told = AdaRank.told

    def seen(self: AdaRank, merge: LearnedMerge) -> str:
        held.append(merge)
        return told(self, merge)

    monkeypatch.setattr(AdaRank, "told", seen)
    learner = AdaRank(
        steps=40, rate=0.05, density=0.5, mask_rate=0.05, folder=str(tmp_path / "out")
    )
    learned = learner.learn(recipe_of(tmp_path, 3), material(3))
    assert learned.trials[0].score < learned.score < 0
    assert "Of 27 singular directions" in learned.recipe.notes[-1]  # 3 experts, ranks 4 and 5
    rows = [row for leaf in held[0].leaves.values() for row in (leaf > 0)]
    assert any(int(row.sum()) != (1 if len(row) < 4 else 2) for row in rows)
    made = dict(merge_tensors(make_plan(learned.recipe)))
    for name, tensor in held[0].module.state_dict().items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-5, atol=1e-6)
    again = learner.learn(recipe_of(tmp_path, 3), material(3))
    assert again.recipe == learned.recipe


def test_one_expert_at_coefficient_one_is_that_expert_and_says_what_it_says(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 1)
    learner = AdaRank(
        steps=1, rate=1e-9, mask_rate=1e-9, start=1.0, learn_from="expert",
        folder=str(tmp_path / "out"),
    )  # fmt: skip
    learned = learner.learn(recipe, material(1))
    assert learned.trials[0].score == pytest.approx(0.0, abs=1e-6)
    assert "expert loss" in learned.recipe.notes[-1]
    merged = dict(merge_tensors(make_plan(learned.recipe)))
    for name, tensor in merge_tensors(make_plan(recipe)):
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)


def test_an_order_of_experts_is_no_matter(tmp_path: Path) -> None:
    recipe, given = recipe_of(tmp_path, 2), material(2)
    learner = AdaRank(steps=10, rate=0.02, mask_rate=0.05, folder=str(tmp_path / "out"))
    there = dict(merge_tensors(make_plan(learner.learn(recipe, given).recipe)))
    turned = recipe.model_copy(update={"experts": recipe.experts[::-1]})
    for name, tensor in merge_tensors(make_plan(learner.learn(turned, given).recipe)):
        torch.testing.assert_close(there[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_folder_and_a_base_are_asked_for_before_anything_is_learned(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="folder=DIR"):
        AdaRank().learn(recipe_of(tmp_path, 2), material(2))
    based = recipe_of(tmp_path, 2)
    with pytest.raises(RecipeError, match="name the base"):
        AdaRank(folder=str(tmp_path)).learn(based.model_copy(update={"base": None}), material(2))


def test_an_expert_that_is_not_adjusted_is_written_as_it_is(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 2)
    plan = make_plan(recipe)
    path = write_expert(plan, 1, {"0.bias": torch.zeros(8)}, str(tmp_path), "x")
    other = recipe.experts[1].model_copy(update={"path": str(path)})
    written = make_plan(recipe.model_copy(update={"experts": (other,)})).experts[0]
    for name in plan.experts[1]:
        source = plan.reference if name == "0.bias" else plan.experts[1]
        torch.testing.assert_close(written[name], source[name])
    assert factory().load_state_dict({name: written[name] for name in written})
