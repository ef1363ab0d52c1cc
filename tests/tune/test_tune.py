"""Tuning on a linear model, where the best scale is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mergewell.cli.main import main
from mergewell.descent.tasks import LearningTask
from mergewell.errors import RecipeError
from mergewell.plan import make_plan
from mergewell.recipe import Recipe
from mergewell.tune.objective import Reference, make_objective
from mergewell.tune.search import Tuned, tune
from mergewell.tune.space import Candidate, candidates

SCALES = (0.25, 0.5, 1.0, 1.5)


def net() -> nn.Module:
    return nn.Linear(4, 3, bias=False)


def tasks(*, labels: int | None = None) -> list[LearningTask]:
    """Inputs in the half that the task's expert reads."""
    found: list[LearningTask] = []
    for place in range(2):
        rows = torch.zeros(8, 4)
        generator = torch.Generator().manual_seed(place)
        rows[:, 2 * place : 2 * place + 2] = torch.randn(8, 2, generator=generator)
        given = () if labels is None else (torch.full((8,), labels),)
        found.append(LearningTask(place, [rows], given))
    return found


def tuned(
    recipe: Recipe,
    data: list[LearningTask] | None = None,
    scales: tuple[float, ...] = SCALES,
    reference: Reference = "expert",
) -> Tuned:
    tried = [Candidate("task_arithmetic", {}, scale) for scale in scales]
    data = tasks() if data is None else data
    objective = make_objective(reference, "logits", data, make_plan(recipe), net)
    return tune(recipe, tried, objective, net)


@pytest.mark.parametrize(("reference", "best"), [("expert", 1.0), ("ensemble", 0.5)])
def test_the_known_best_scale_is_found(recipe: Recipe, reference: Reference, best: float) -> None:
    found = tuned(recipe, reference=reference)
    assert found.recipe.method.model_extra == {"scale": best}
    assert found.tried[0].divergence.value == pytest.approx(0, abs=1e-6)
    assert found.tried[1].divergence.value > 1e-3
    assert "without labels among 4 candidates on 16 inputs" in found.recipe.notes[-1]


def test_a_mix_lies_between_its_halves(recipe: Recipe) -> None:
    plan = make_plan(recipe)
    for outputs in ("logits", "features"):
        made = {
            reference: make_objective(reference, outputs, tasks(), plan, net).references[1][0]
            for reference in ("expert", "ensemble", "mix")
        }
        assert torch.allclose(made["mix"], (made["expert"] + made["ensemble"]) / 2)
        assert not torch.allclose(made["expert"], made["ensemble"])


def test_features_are_compared_by_direction(recipe: Recipe) -> None:
    objective = make_objective("expert", "features", tasks(), make_plan(recipe), net)
    scales = [Candidate("task_arithmetic", {}, scale) for scale in (0.5, 2.0)]
    found = tune(recipe, scales, objective, net)  # a half and twice as long, the same direction
    assert [each.divergence.value for each in found.tried] == pytest.approx([0, 0], abs=1e-6)
    turned = tune(recipe, [Candidate("task_arithmetic", {"scale": -1.0})], objective, net)
    assert turned.tried[0].divergence.value == pytest.approx(2)


def test_another_answer_than_the_experts_costs_one(recipe: Recipe) -> None:
    plan = make_plan(recipe)
    plain = make_objective("mix", "logits", tasks(), plan, net)
    answers = make_objective("answers", "logits", tasks(), plan, net)
    for scale in (0.5, -1.0):
        one = [Candidate("task_arithmetic", {"scale": scale})]
        less, more = (tune(recipe, one, aim, net).tried[0].divergence.value
                      for aim in (plain, answers))  # fmt: skip
        # the experts of halves add up: the answers stay at half the length, all turn when turned
        assert more - less == pytest.approx(0.0 if scale > 0 else 1.0, abs=1e-6)
    with pytest.raises(RecipeError, match="Features give no answers"):
        make_objective("answers", "features", tasks(), plan, net)


def test_labels_are_never_looked_at(recipe: Recipe) -> None:
    assert tuned(recipe, tasks(labels=0)) == tuned(recipe, tasks(labels=2)) == tuned(recipe)


def test_the_order_of_the_experts_does_not_matter(recipe: Recipe) -> None:
    turned = recipe.model_copy(update={"experts": recipe.experts[::-1]})
    first, second = tasks()
    swapped = [LearningTask(0, second.batches), LearningTask(1, first.batches)]
    here, there = tuned(recipe), tuned(turned, swapped)
    assert here.recipe.method == there.recipe.method
    values = [[each.divergence.value for each in found.tried] for found in (here, there)]
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_the_regret_is_nothing_for_one_candidate_and_something_for_two(recipe: Recipe) -> None:
    assert tuned(recipe, scales=(0.5,)).regret == 0
    assert tuned(recipe, scales=(1.0, 1.0)).regret == 0
    # too little and too much: some inputs like the one better, some the other
    data = [LearningTask(0, [torch.randn(8, 4, generator=torch.Generator().manual_seed(5))])]
    assert tuned(recipe, data, scales=(0.4, 0.5, 0.6)).regret > 0


def test_a_merge_at_one_scale_serves_the_others(recipe: Recipe) -> None:
    by_lerp = tuned(recipe, scales=(0.3,)).tried[0].divergence.value
    objective = make_objective("expert", "logits", tasks(), make_plan(recipe), net)
    merged = tune(recipe, [Candidate("task_arithmetic", {"scale": 0.3})], objective, net)
    assert by_lerp == pytest.approx(merged.tried[0].divergence.value, rel=1e-5)


def test_candidates_take_turns_and_depend_on_the_seed_alone() -> None:
    found = candidates(["ties", "task_arithmetic"], budget=10)
    assert [each.method for each in found] == ["ties", "task_arithmetic"] * 10
    assert found == candidates(["ties", "task_arithmetic"], budget=10)
    assert found != candidates(["ties", "task_arithmetic"], budget=10, seed=1)
    densities = [each.parameters["density"] for each in found if each.method == "ties"]
    assert {densities.count(density) for density in densities} == {2}
    assert len({each.scale for each in found if each.method == "ties"}) == 10
    assert len(candidates(["average"], budget=10)) == 1
    with pytest.raises(RecipeError, match="does not make"):
        candidates(["regmean"])


def test_the_command(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "nets_to_tune.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Linear(4, 3, bias=False)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["tune", "--base", str(recipe.base), "--model-factory", "nets_to_tune:net"]
    for place, task in enumerate(tasks()):
        batch = task.batches[0]
        assert isinstance(batch, torch.Tensor)
        np.savez(tmp_path / f"{place}.npz", x=batch.numpy())
        flags += ["--expert", recipe.experts[place].path, "--data", str(tmp_path / f"{place}.npz")]
    flags += ["--method", "task_arithmetic"]
    assert main([*flags, "--reference", "expert", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"]["method"] == {"name": "task_arithmetic", "scale": 1.0}
    assert (len(found["candidates"]), found["samples"]) == (10, 16)
    named = [*flags, "--reference", "expert", "--out", str(tmp_path / "r.yaml")]
    assert main(named) == 0
    assert "task_arithmetic scale=1.0" in capsys.readouterr().out.splitlines()[0]
    assert main(named) == 2
    features = [*flags, "--outputs", "features", "--json"]
    assert main(features) == 0
    assert json.loads(capsys.readouterr().out)["reference"] == "mix"
    assert main([*flags, "--reference", "exprt"]) == 2
    assert "expert" in capsys.readouterr().err
