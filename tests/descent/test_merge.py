"""A learned merge: its gradients are those of brute force, its recipe makes the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import factory, tiny_family
from torch import Tensor
from torch.func import functional_call

from mergewell.descent.adjustment import Adjustment, with_task_vectors
from mergewell.descent.merge import LearnedMerge
from mergewell.errors import MethodError, ModelError
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors
from mergewell.tensor_group import TensorGroup


def recipe_of(folder: Path, method: dict[str, Any], *, rules: Any = (), count: int = 3) -> Recipe:
    base, experts = tiny_family(folder, count)
    named = [{"path": str(path), "coefficient": 0.2 + 0.1 * i} for i, path in enumerate(experts)]
    return make_recipe(
        {"base": str(base), "experts": named, "method": method, "rules": list(rules)}
    )


def brute_gradient(merge: LearnedMerge, inputs: Tensor) -> Tensor:
    """Differentiate from the coefficients to the loss in one graph, on task arithmetic."""
    rows = merge.coefficients.detach().clone().requires_grad_()
    state = {name: t.detach() for name, t in merge.module.state_dict().items()}
    for part in merge.parts:
        name = part.task.name
        base = merge.plan.reference[name]
        state[name] = base + sum(
            rows[part.row, k].float() * (expert[name] - base)
            for k, expert in enumerate(merge.plan.experts)
        )
    loss = functional_call(merge.module, state, (inputs,)).square().mean()
    return torch.autograd.grad(loss, rows)[0]


@pytest.mark.parametrize("per", ["task", "tensor"])
@pytest.mark.parametrize("held", [0, 1 << 20])
def test_the_gradient_is_that_of_one_graph(tmp_path: Path, per: Any, held: int) -> None:
    recipe = recipe_of(tmp_path, {"name": "task_arithmetic", "scale": 1.0})
    merge = LearnedMerge(recipe, factory(), per=per, held=held)
    inputs = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    merge.module(inputs).square().mean().backward()
    found = merge.gradient()
    assert found.shape == ((1, 3) if per == "task" else (4, 3))
    torch.testing.assert_close(found, brute_gradient(merge, inputs), rtol=1e-5, atol=1e-7)
    assert float(found.abs().min()) > 0


def test_the_gradient_of_ties_is_that_of_small_steps(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, {"name": "ties", "density": 0.5, "divide": "none", "trim_scope": "model"}
    )
    merge = LearnedMerge(recipe, factory(), per="task")
    inputs = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    merge.module(inputs).square().mean().backward()
    found = merge.gradient()[0, 1]
    losses: list[float] = []
    for step in (0.01, -0.01):
        with torch.no_grad():
            merge.coefficients[0, 1] += step
        merge.place()
        losses.append(float(merge.module(inputs).square().mean().detach()))
        with torch.no_grad():
            merge.coefficients[0, 1] -= step
    assert float(found) == pytest.approx((losses[0] - losses[1]) / 0.02, rel=1e-2)


@pytest.mark.parametrize("per", ["task", "tensor"])
def test_the_recipe_makes_the_modules_weights(tmp_path: Path, per: Any) -> None:
    recipe = recipe_of(tmp_path, {"name": "task_arithmetic", "scale": 0.5})
    merge = LearnedMerge(recipe, factory(), per=per)
    with torch.no_grad():
        merge.coefficients += torch.randn(merge.coefficients.shape, dtype=torch.float64)
    merge.place()
    made = dict(merge_tensors(make_plan(merge.recipe())))
    for name, tensor in merge.module.state_dict().items():
        torch.testing.assert_close(made[name], tensor)


def test_tensors_that_did_not_move_or_have_a_rule_are_left_alone(tmp_path: Path) -> None:
    rules = [{"match": "2.bias", "method": {"name": "average"}}]
    recipe = recipe_of(tmp_path, {"name": "task_arithmetic"}, rules=rules)
    merge = LearnedMerge(recipe, factory())
    # 3.* are equal in all models
    assert {part.task.name for part in merge.parts} == {"0.weight", "0.bias", "2.weight"}
    with pytest.raises(ModelError, match="No expert moved"):
        LearnedMerge(
            recipe.model_copy(
                update={"experts": tuple(e.model_copy(update={"path": recipe.base})
                                         for e in recipe.experts)}
            ),
            factory(),
        )  # fmt: skip


def test_a_method_that_ignores_its_coefficients_is_named(tmp_path: Path) -> None:
    merge = LearnedMerge(recipe_of(tmp_path, {"name": "model_stock"}), factory())
    merge.module(torch.ones(1, 4)).sum().backward()
    with pytest.raises(MethodError, match="whatever the coefficients"):
        merge.gradient()


class Doubling(Adjustment):
    """Each task vector times a learned number an element."""

    def start(self, group: TensorGroup) -> Tensor | None:
        return None if group.experts[0].dim() < 2 else torch.full_like(group.experts[0], 2.0)

    def adjusted(self, group: TensorGroup, leaf: Tensor) -> TensorGroup:
        return with_task_vectors(group, [leaf * tau for tau in group.task_vectors])


@pytest.mark.parametrize("held", [0, 1 << 20])
def test_an_adjustment_s_leaf_has_the_gradient_of_one_graph(tmp_path: Path, held: int) -> None:
    recipe = recipe_of(tmp_path, {"name": "task_arithmetic", "scale": 1.0})
    merge = LearnedMerge(recipe, factory(), per="layer", adjustment=Doubling(), held=held)
    assert {*merge.leaves} == {"0.weight", "2.weight"}
    assert merge.coefficients.shape == (2, 3)
    inputs = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    merge.module(inputs).square().mean().backward()
    rows = merge.gradient()
    leaves = {n: leaf.detach().clone().requires_grad_() for n, leaf in merge.leaves.items()}
    coefficients = merge.coefficients.detach().clone().requires_grad_()
    state = {name: t.detach() for name, t in merge.module.state_dict().items()}
    for part in merge.parts:
        name = part.task.name
        base = merge.plan.reference[name]
        summed = sum(
            coefficients[part.row, k].float() * (expert[name] - base)
            for k, expert in enumerate(merge.plan.experts)
        )
        state[name] = base + leaves.get(name, torch.ones(())) * summed
    loss = functional_call(merge.module, state, (inputs,)).square().mean()
    loss.backward()
    torch.testing.assert_close(rows, coefficients.grad, rtol=1e-5, atol=1e-7)
    for name, leaf in merge.leaves.items():
        torch.testing.assert_close(leaf.grad, leaves[name].grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(merge.module.state_dict()[name], state[name].detach())


def test_by_task_a_rule_s_own_coefficients_stay(tmp_path: Path) -> None:
    rules = [{"match": "2.*", "coefficients": [0.5, 0.0, 0.0]}]
    recipe = recipe_of(tmp_path, {"name": "task_arithmetic"}, rules=rules)
    by_task = LearnedMerge(recipe, factory(), per="task")
    assert {part.task.name for part in by_task.parts} == {"0.weight", "0.bias"}
    by_layer = LearnedMerge(recipe, factory(), per="layer")
    assert by_layer.coefficients[1].tolist() == [0.5, 0.0, 0.0]
