"""ProDistill: by hand, one expert is that expert, layers come near, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import factory, tiny_family
from learning import distant
from safetensors.torch import save_file
from torch import nn

from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError, ModelError, RecipeError
from mergewell.learners.base import Material
from mergewell.learners.prodistill import ProDistill
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(5, 5)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        x += 1.0  # writes into what it is given
        return (x + self.act(self.map(x)),)


class Deep(nn.Module):
    """A stem, two blocks, a scale that no piece owns, and an end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.blocks = nn.ModuleList([Residual(), Residual()])
        self.scale = nn.Parameter(torch.ones(5))
        self.end = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            (x,) = block(x)
        return self.end(x * self.scale)


def deep() -> nn.Module:
    return Deep().eval()


def deep_recipe(folder: Path, count: int, **more: object) -> Recipe:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = deep().state_dict()
        save_file(base, folder / "base.safetensors")
        for number in range(count):
            moved = {n: t + 0.4 * torch.randn_like(t) for n, t in base.items()}
            save_file(moved, folder / f"{number}.safetensors")
    experts = [{"path": str(folder / f"{n}.safetensors")} for n in range(count)]
    return make_recipe({"base": str(folder / "base.safetensors"), "experts": experts, **more})


def material(count: int) -> Material:
    return distant(deep, count)


def merged(recipe: Recipe) -> dict[str, torch.Tensor]:
    return dict(merge_tensors(make_plan(recipe)))


def test_one_step_and_many_by_hand(tmp_path: Path) -> None:
    """From base 0, experts (2, 1) on x = (1, 0) and (1, 3) on x = (0, 1).

    At 0.5 the merge is (1.5, 2), too low for 2 and 3; a step of 0.1 makes every coefficient 0.6,
    the merge (1.8, 2.4). Many steps find (2, 3), where both tasks are solved: (-0.2)^2 + (-0.6)^2
    was the distance after one.
    """
    for name, row in {"base": [0.0, 0.0], "a": [2.0, 1.0], "b": [1.0, 3.0]}.items():
        save_file({"weight": torch.tensor([row])}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "b")]
    recipe = make_recipe({"base": paths[0], "experts": [{"path": path} for path in paths[1:]]})
    tasks = [LearningTask(k, [x[None]]) for k, x in enumerate(torch.eye(2))]
    given = Material(lambda: nn.Linear(2, 1, bias=False).eval(), tasks=tasks)
    once = ProDistill(start=0.5, epochs=1, rate=0.1, folder=str(tmp_path)).learn(recipe, given)
    assert merged(once.recipe)["weight"].tolist() == [pytest.approx([1.8, 2.4], abs=1e-5)]
    assert once.trials[0].score == pytest.approx(-((1.25 / 13) ** 0.5), rel=1e-5)
    assert once.score == pytest.approx(-((0.4 / 13) ** 0.5), rel=1e-4)
    often = ProDistill(start=0.5, epochs=150, rate=0.1, folder=str(tmp_path)).learn(recipe, given)
    assert merged(often.recipe)["weight"].tolist() == [pytest.approx([2.0, 3.0], abs=1e-3)]


def test_one_expert_is_that_expert(tmp_path: Path) -> None:
    recipe = deep_recipe(tmp_path, 1)
    learned = ProDistill(start=1.0, epochs=3, folder=str(tmp_path / "o")).learn(recipe, material(1))
    assert learned.trials[0].score == pytest.approx(0.0, abs=1e-5)
    found, expert = merged(learned.recipe), make_plan(recipe).experts[0]
    assert all(torch.allclose(found[name], expert[name], atol=2e-6) for name in expert)


def test_without_epochs_it_is_task_arithmetic(tmp_path: Path) -> None:
    recipe = deep_recipe(tmp_path, 2, method={"name": "task_arithmetic", "scale": 0.3})
    learned = ProDistill(start=0.3, epochs=0, folder=str(tmp_path / "o")).learn(recipe, material(2))
    found, wanted = merged(learned.recipe), merged(recipe)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)


def test_layers_and_the_whole_come_near_to_the_experts(tmp_path: Path) -> None:
    rules = [{"match": "blocks.0.map.bias", "method": {"name": "average"}}]
    method = {"name": "task_arithmetic", "scale": 0.3}
    recipe, given = deep_recipe(tmp_path, 2, rules=rules, method=method), material(2)
    learned = ProDistill(epochs=40, folder=str(tmp_path / "o")).learn(recipe, given)
    assert -learned.score < 0.5 * -learned.trials[0].score
    assert "of 4 layers" in learned.recipe.notes[-1]
    before, after = merged(recipe), merged(learned.recipe)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"blocks.0.map.bias", "scale"}
    plan = make_plan(recipe)

    def distance(weights: dict[str, torch.Tensor]) -> float:
        net, total = deep(), 0.0
        for k, task in enumerate(given.tasks):
            for batch in task.batches:
                with torch.no_grad():
                    net.load_state_dict(dict(plan.experts[k]))
                    target = net(batch)
                    net.load_state_dict(weights)
                    total += float((net(batch) - target).square().sum())
        return total

    assert distance(after) < 0.4 * distance(before)
    again = ProDistill(epochs=40, folder=str(tmp_path / "o")).learn(recipe, given)
    assert again.recipe == learned.recipe


def test_a_layer_that_does_not_come_nearer_keeps_the_start(tmp_path: Path) -> None:
    recipe = deep_recipe(tmp_path, 2, method={"name": "task_arithmetic", "scale": 0.3})
    wild = ProDistill(epochs=2, rate=1e6, folder=str(tmp_path / "o")).learn(recipe, material(2))
    found, wanted = merged(wild.recipe), merged(recipe)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert wild.score == wild.trials[0].score


def test_mistakes_are_refused(tmp_path: Path) -> None:
    recipe, given = deep_recipe(tmp_path, 2), material(2)
    short = ProDistill(epochs=1, folder=str(tmp_path / "o"))
    with pytest.raises(RecipeError, match="--set folder=DIR"):
        ProDistill().learn(recipe, given)
    with pytest.raises(DataError, match="inputs for each expert by itself"):
        short.learn(recipe, Material(deep))
    with pytest.raises(DataError, match="inputs for each expert by itself"):
        short.learn(recipe, Material(deep, tasks=[replace(given.tasks[0], expert=None)]))
    with pytest.raises(DataError, match=r"belong to experts \[0, 1, 2\] of 2"):
        short.learn(recipe, material(3))
    with pytest.raises(RecipeError, match="name the base"):
        short.learn(recipe.model_copy(update={"base": None}), given)

    class Twice(Deep):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[..., :4] + 0 * self.stem(x)[..., :4])

    with pytest.raises(ModelError, match="stem is run more than once"):
        short.learn(recipe, replace(given, factory=lambda: Twice().eval()))
    base, experts = tiny_family(tmp_path, 1)
    small = make_recipe({"base": str(base), "experts": [{"path": str(experts[0])}]})
    tasks = [LearningTask(0, [torch.randn(4, 4)])]
    assert short.learn(small, Material(factory, tasks=tasks)).recipe.notes
