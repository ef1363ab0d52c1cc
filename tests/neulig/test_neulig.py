"""NeuLig: the penalties by hand, the modes, and where merging and ensembling must agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import factory, tiny_family
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError
from mergewell.learners.base import Material
from mergewell.learners.neulig import NeuLig
from mergewell.neulig.agreement import agreement, merged_logits
from mergewell.neulig.modes import (
    Merges,
    coefficients_of,
    described,
    entropy,
    merges,
    passes,
    recipe_of,
)
from mergewell.neulig.offsets import Offsets, offsets
from mergewell.neulig.portland import Constant, Portland, embeddings, pooled
from mergewell.neulig.training import Training, ensemble_logits, train
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe


def recipe_of_files(base: Path, experts: list[Path]) -> Recipe:
    return make_recipe({"base": str(base), "experts": [{"path": str(path)} for path in experts]})


def family(folder: Path, count: int = 3, size: float = 0.5) -> Recipe:
    return recipe_of_files(*tiny_family(folder, count, size))


def inputs(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 4, generator=generator) for size in sizes]


def test_offsets_are_those_of_the_whole_vectors(tmp_path: Path) -> None:
    recipe = family(tmp_path)
    states = [load_file(expert.path) for expert in recipe.experts]
    flat = torch.stack([torch.cat([s[n].flatten() for n in sorted(s)]) for s in states]).double()
    apart = flat - flat.mean(0)
    found = offsets(make_plan(recipe))
    gram = apart @ apart.T
    torch.testing.assert_close(found.products, gram / gram.diagonal().mean())
    sums = apart.sum(1)
    torch.testing.assert_close(found.sums, (sums - sums.mean()) / sums.std())
    shares = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    whole = (shares @ apart).square().sum() / gram.diagonal().mean()
    torch.testing.assert_close(found.penalty("offset", shares)[0], whole)
    spread = (shares[0] * apart.square().sum(1)).sum() - (shares @ apart).square().sum()
    torch.testing.assert_close(
        found.penalty("dispersion", shares)[0], spread / gram.diagonal().mean()
    )


def test_penalties_by_hand() -> None:
    # two experts at +1 and -1: their mean is 0, e = (1, -1), s = (0.707, -0.707)
    products = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    two = Offsets(products, torch.tensor([0.5, -0.5], dtype=torch.float64).mul(2**0.5))
    shares = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.75, 0.25]], dtype=torch.float64)
    assert two.penalty("scalar", shares).tolist() == pytest.approx([0.0, 0.5, 0.125])
    assert two.penalty("offset", shares).tolist() == pytest.approx([0.0, 1.0, 0.25])
    # b(1 - b) |theta_1 - theta_2|^2 with a distance of 2
    assert two.penalty("dispersion", shares).tolist() == pytest.approx([1.0, 0.0, 0.75])
    assert two.penalty("none", shares).tolist() == [0.0, 0.0, 0.0]


def test_portland_is_a_linear_layer_and_a_softmax() -> None:
    network = Portland(3, 4, seed=1)
    assert sum(p.numel() for p in network.parameters()) == 3 * (3 * 4 + 1)
    seen = torch.randn(5, 3, 4)
    expected = (seen.reshape(5, 12) @ network.linear.weight.T + network.linear.bias).softmax(1)
    torch.testing.assert_close(network(seen), expected)
    assert torch.equal(Portland(3, 4, seed=1).linear.weight, network.linear.weight)
    assert Constant(4)(seen).tolist() == [[0.25] * 4] * 5
    assert pooled(torch.ones(2, 3, 7, 4)).shape == (2, 3, 4)


def test_one_hot_coefficients_are_that_expert_and_leave_no_gap(tmp_path: Path) -> None:
    recipe, (x,) = family(tmp_path), inputs(9)
    task = LearningTask(0, [x[:5], x[5:]])
    seen = embeddings(make_plan(recipe), factory, [task])[0]
    shares = torch.tensor([0.0, 1.0, 0.0])
    merged = merged_logits(
        recipe, factory, task, Merges(shares[None], torch.zeros(9, dtype=torch.int64))
    )
    torch.testing.assert_close(merged, seen[:, 1])
    found = agreement(merged, ensemble_logits(seen, shares, task), seen[:, 1].argmax(-1))
    assert found.gap == 0 and found.merged == 1 and found.divergence == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("linear", [False, True])
def test_equal_or_linear_models_leave_no_gap_for_any_coefficients(
    tmp_path: Path, linear: bool
) -> None:
    make = (lambda: nn.Sequential(nn.Linear(4, 3)).eval()) if linear else factory
    if linear:
        torch.manual_seed(0)
        states = [make().state_dict() for _ in range(3)]
        paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
        for state, path in zip(states, paths, strict=True):
            save_file(state, path)
        recipe = recipe_of_files(paths[0], paths[1:])
    else:
        base, experts = tiny_family(tmp_path, 1)
        recipe = recipe_of_files(base, [experts[0], experts[0]])
    (x,) = inputs(6)
    task = LearningTask(0, [x])
    seen = embeddings(make_plan(recipe), make, [task])[0]
    shares = torch.tensor([0.3, 0.7])
    merged = merged_logits(
        recipe, make, task, Merges(shares[None], torch.zeros(6, dtype=torch.int64))
    )
    torch.testing.assert_close(merged, ensemble_logits(seen, shares, task))


def test_the_gap_falls_with_the_square_of_the_offsets(tmp_path: Path) -> None:
    (x,) = inputs(50)
    gaps: list[float] = []
    for size in (0.04, 0.02):
        folder = tmp_path / str(size)
        folder.mkdir()
        recipe, task = family(folder, 2, size), LearningTask(0, [x])
        seen = embeddings(make_plan(recipe), factory, [task])[0]
        shares = torch.tensor([0.5, 0.5])
        owner = torch.zeros(50, dtype=torch.int64)
        merged = merged_logits(recipe, factory, task, Merges(shares[None], owner))
        gaps.append(float((merged - ensemble_logits(seen, shares, task)).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.05)


def test_modes_take_the_coefficients_they_say() -> None:
    seen = [torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]), torch.tensor([[0.2, 0.8]])]
    by_sample = merges("sample", seen, seen, 0)
    assert torch.equal(by_sample.coefficients, seen[0]) and by_sample.owner.tolist() == [0, 1, 2]
    first = merges("batch", seen, seen, 0, batch=2)
    assert first.coefficients.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert first.owner.tolist() == [0, 0, 1]
    mean = merges("batch_mean", seen, seen, 0, batch=2)
    torch.testing.assert_close(mean.coefficients, torch.tensor([[0.75, 0.25], [0.0, 1.0]]))
    task = merges("task", seen, seen, 0)
    torch.testing.assert_close(task.coefficients, torch.tensor([[0.5, 0.5]]))
    # every task counts the same, whatever its number of inputs
    whole = merges("global", seen, seen, 0)
    torch.testing.assert_close(whole.coefficients, torch.tensor([[0.35, 0.65]]))
    assert [passes(mode, 5) for mode in ("sample", "batch", "task", "static")] == [6, 6, 1, 1]


def test_it_says_plainly_when_it_is_a_router() -> None:
    hot, even = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    assert entropy(hot) == 0.0 and entropy(even) == pytest.approx(1.0)
    assert "is a router and chooses nearly a single expert" in described("batch", hot)
    assert "one merged model" in described("static", even)


def test_portland_learns_which_expert_knows(tmp_path: Path) -> None:
    recipe, plan = family(tmp_path, 2), make_plan(family(tmp_path, 2))
    # two tasks at two places, each answered by its own expert
    tasks = [LearningTask(k, [x + 4 * (2 * k - 1)]) for k, x in enumerate(inputs(64, 64))]
    outputs = embeddings(plan, factory, tasks)
    network = Portland(2, 3)
    how = Training("expert", "none", epochs=150, batch=32, rate=0.05)
    history = train(network, outputs, tasks, offsets(plan), how)
    assert history[-1] < history[0]
    seen = [coefficients_of(network, each) for each in outputs]
    assert float(seen[0][:, 0].mean()) > 0.8 and float(seen[1][:, 1].mean()) > 0.8
    found = merged_logits(recipe, factory, tasks[1], merges("task", seen, seen, 1))
    said = agreement(found, outputs[1][:, 1], None)
    assert said.disagreement < 0.1


@pytest.mark.parametrize("mode", ["static", "global"])
def test_the_learner_returns_one_convex_average(tmp_path: Path, mode: str) -> None:
    recipe = family(tmp_path, 2)
    tasks = tuple(LearningTask(0, [x]) for x in inputs(32, 32))  # only the first expert is asked
    material = Material(factory, tasks=tasks)
    learner = NeuLig.model_validate({"mode": mode, "epochs": 100, "penalty": "none"})
    learned = learner.learn(recipe, material)
    shares = [expert.coefficient for expert in learned.recipe.experts]
    assert sum(shares) == pytest.approx(1.0) and shares[0] > 0.6
    assert learned.recipe.method.name == "average"
    assert "one merged model" in learned.recipe.notes[-1]
    assert recipe_of(recipe, torch.tensor([0.25, 0.75])).experts[1].coefficient == 0.75


def test_what_it_needs_is_said(tmp_path: Path) -> None:
    recipe = family(tmp_path, 2)
    with pytest.raises(DataError, match="inputs of each"):
        NeuLig().learn(recipe, Material(factory))
    unlabelled = Material(factory, tasks=(LearningTask(0, inputs(4)),))
    with pytest.raises(DataError, match="labels of every task"):
        NeuLig(aim="labels").learn(recipe, unlabelled)
