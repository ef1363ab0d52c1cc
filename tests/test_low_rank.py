"""Another method in the experts' own directions: core_space and knots have this in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from laws import group_of
from toys import family, recipe_of

from mergewell import low_rank
from mergewell.errors import PlanError, RecipeError
from mergewell.linalg import frobenius
from mergewell.methods.base import METHODS
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.ties import Ties
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import merge_tensors, run
from mergewell.tensor_group import TensorGroup

NAMES = ("core_space", "knots")
SUM = {"name": "task_arithmetic", "scale": 1.0}


def low_rank_group(shape: tuple[int, ...], ranks: tuple[int, ...]) -> TensorGroup:
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    outputs, inputs = shape[0], torch.Size(shape[1:]).numel()
    base = drawn(*shape)
    deltas = [(drawn(outputs, r) @ drawn(r, inputs)).view(shape) for r in ranks]
    coefficients = torch.linspace(-0.5, 1.5, len(ranks), dtype=torch.float64)
    return TensorGroup("w", tuple(base + d for d in deltas), coefficients, base)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(40, 30), (20, 50), (12, 5, 3, 3), (300, 280)])
def test_a_linear_method_loses_nothing(name: str, shape: tuple[int, ...]) -> None:
    group = low_rank_group(shape, (2, 7, 4))
    plain = TaskArithmetic(scale=1.0).merge(group)
    merged = METHODS.build(name, {"of": SUM}).merge(group)
    assert frobenius(merged - plain) < 1e-12 * frobenius(plain - group.required_base)


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_experts_lose_nothing_either(name: str) -> None:
    group = group_of(Ties(), (30, 20), dtype=torch.float64)
    plain = TaskArithmetic(scale=1.0).merge(group)
    assert torch.allclose(METHODS.build(name, {"of": SUM}).merge(group), plain, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_that_did_not_move_changes_nothing(name: str) -> None:
    group = low_rank_group((20, 30), (3, 2))
    base = group.required_base
    still = TensorGroup("w", (*group.experts, base), torch.ones(3, dtype=torch.float64), base)
    two = TensorGroup("w", group.experts, torch.ones(2, dtype=torch.float64), base)
    method = METHODS.build(name, {"of": {"name": "ties", "density": 1.0}})
    assert torch.allclose(method.merge(still), method.merge(two), atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_and_excluded_tensors_get_the_inner_method(name: str) -> None:
    inner = {"name": "ties", "density": 0.5}
    method = METHODS.build(name, {"of": inner, "scale": 0.5})
    group = group_of(Ties(), (9,))
    base = group.required_base
    plain = base + 0.5 * (Ties(density=0.5).merge(group) - base)
    assert torch.equal(method.merge(group), plain)
    assert method.for_tensor("lm_head.weight", shape=(4, 4), guided=False) == Ties(density=0.5)
    assert method.for_tensor("layer.weight", shape=(4, 4), guided=False) == method


def test_a_sketch_is_taken_only_where_it_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    whole = low_rank.svd
    monkeypatch.setattr(low_rank, "svd", lambda m: calls.append("whole") or whole(m))
    group = low_rank_group((300, 280), (9,))
    delta = group.experts[0] - group.required_base
    factors = low_rank.decomposed(delta, seed=1)
    assert not calls and len(factors.values) == 9
    assert frobenius(factors.matrix() - delta) < 1e-12 * frobenius(delta)
    noisy = delta + 1e-3 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(1))
    assert len(low_rank.decomposed(noisy, seed=1).values) == 280 and calls == ["whole"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("inner", "sentence"),
    [
        ({"name": "m_ties"}, "m_ties is guided by rows of the tensor"),
        ({"name": "ties", "trim_scope": "model"}, "ties looks at the whole model"),
        ({"name": "tees"}, "There is no method 'tees': did you mean 'ties'"),
        ({"density": 0.2}, "an inner method needs a name"),
    ],
)
def test_inner_methods_that_cannot_work_are_refused(
    name: str, inner: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        METHODS.build(name, {"of": inner})


@pytest.mark.parametrize("name", NAMES)
def test_adapters_of_two_ranks_and_a_whole_expert(tmp_path: Path, name: str) -> None:
    base, experts = family(tmp_path, 1)
    generator = torch.Generator().manual_seed(0)
    paths = [
        save_adapter(
            tmp_path / f"a{rank}",
            {
                "layer.0.lora_A.weight": torch.randn(rank, 500, generator=generator) / 50,
                "layer.0.lora_B.weight": torch.randn(300, rank, generator=generator) / 50,
            },
            r=rank,
            lora_alpha=2 * rank,
        )
        for rank in (2, 5)
    ]
    # 0.7 times 5 steps of bfloat16 would end halfway between two, where rounding is a draw
    method = {"name": name, "of": {"name": "task_arithmetic", "scale": 0.5**0.5}}
    wrapped = make_plan(recipe_of(base, [*paths, *experts], method))
    plain = make_plan(recipe_of(base, [*paths, *experts], method["of"]))
    due = dict(merge_tensors(plain))
    for tensor, merged in merge_tensors(wrapped):
        assert torch.allclose(merged.double(), due[tensor].double(), rtol=2.0**-7, atol=1e-9)
        assert float((merged != due[tensor]).double().mean()) < 1e-4, tensor
    recipe = recipe_of(base, paths, {"name": name, "of": {"name": "ties", "density": 0.5}})
    assert make_recipe(recipe.as_data()) == recipe
    manifest = run(make_plan(recipe), tmp_path / "out")
    assert list(manifest.relative_changes) == ["layer.0.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_inner_method_needs_is_asked_for(tmp_path: Path, name: str) -> None:
    base, experts = family(tmp_path, 3)
    with pytest.raises(PlanError, match="takes 2 experts, but 3 are named"):
        make_plan(recipe_of(base, experts, {"name": name, "of": {"name": "slerp"}}))
    with pytest.raises(PlanError, match="minimum = 4"):
        make_plan(
            recipe_of(base, experts, {"name": name, "of": {"name": "consensus", "minimum": 4}})
        )
