"""Strategies, early stop, metrics, journals and the anchored reference, on a linear model."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from mergewell.cli.main import main
from mergewell.descent.tasks import LearningTask
from mergewell.errors import OutputError, RecipeError
from mergewell.plan import make_plan
from mergewell.recipe import Recipe
from mergewell.tune.given import tune_given
from mergewell.tune.journal import Journal
from mergewell.tune.objective import make_objective
from mergewell.tune.search import no_gain, tune
from mergewell.tune.space import Candidate, candidates
from mergewell.tune.strategy import Lines
from mergewell.tune.trying import Trying


def net() -> nn.Module:
    return nn.Linear(4, 3, bias=False)


def net_of_base() -> nn.Module:
    module = net()
    nn.init.zeros_(module.get_parameter("weight"))
    return module


@dataclass
class Length:
    """Costs how far the weights' length is from `target`; each of 4 inputs the same."""

    target: float
    pause_s: float = 0.0
    seen: list[float] = field(default_factory=list[float])

    def losses(self, module: nn.Module) -> tuple[NDArray[np.float64], ...]:
        time.sleep(self.pause_s)
        length = float(torch.cat([each.detach().flatten() for each in module.parameters()]).norm())
        self.seen.append(length)
        return (np.full(4, (length - self.target) ** 2),)


def length(recipe: Recipe) -> float:
    """The length of the sum of the experts' weights."""
    experts = make_plan(recipe).experts
    return float(sum(each["weight"] for each in experts).norm())  # pyright: ignore


def scales(*values: float) -> list[Candidate]:
    return [Candidate("task_arithmetic", {}, value) for value in values]


def test_any_objective_drives_the_search(recipe: Recipe) -> None:
    found = tune(recipe, scales(0.25, 0.5, 1.0), Length(length(recipe) / 2), net, metric="mine")
    assert found.recipe.method.model_extra == {"scale": 0.5}
    assert "by the metric mine" in found.recipe.notes[-1] and found.metric == "mine"


def test_one_merge_serves_all_scales(recipe: Recipe) -> None:
    trying = Trying(recipe, net)
    for candidate in (*scales(0.25, 0.5, 1.0), Candidate("ties", {"density": 0.5}, 1.0),
                      Candidate("ties", {"density": 0.5}, 2.0)):  # fmt: skip
        trying.put(candidate)
    assert trying.merges == 2


def test_golden_section_finds_a_scale_between_those_of_the_grid(recipe: Recipe) -> None:
    objective = Length(0.62 * length(recipe))
    found = tune(recipe, Lines(["task_arithmetic"], budget=9), objective, net)
    assert found.tried[0].candidate.scale == pytest.approx(0.62, rel=0.05)
    assert len(objective.seen) <= 9
    two = Length(1.3 * length(recipe))
    found = tune(recipe, Lines(["ties", "average"], budget=16), two, net)
    assert {each.candidate.parameters["density"] for each in found.tried[:-1]
            if each.candidate.method == "ties"} == {0.05, 0.1, 0.2, 0.4, 0.8}  # fmt: skip
    assert found.tried[0].divergence.value < 0.02 and len(two.seen) <= 17
    with pytest.raises(RecipeError, match="does not make"):
        Lines(["regmean"])


def test_a_search_stops_where_nothing_is_gained(recipe: Recipe) -> None:
    aim = Length(length(recipe))
    tried = scales(1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    found = tune(recipe, tried, aim, net, patience=3)
    assert len(found.tried) == len(aim.seen) == 4
    assert found.stopped is not None and found.stopped in found.recipe.notes[-1]
    assert found.stopped.startswith("Stopped after 4 of 6: best and second within ")
    whole = tune(recipe, tried[::-1], aim, net, patience=3)  # each is better than the one before
    assert whole.stopped is None and len(whole.tried) == 6
    both = [*tried, Candidate("average", {}, None)]
    assert len(tune(recipe, both, aim, net, patience=3).tried) == 7  # all methods are tried


def test_a_gain_within_its_error_is_none() -> None:
    rows = [np.array([1.0, 1.0, 1.0, 1.0]), np.array([0.9, 1.0, 0.9, 1.1])]
    assert no_gain([(rows[0],), (rows[1],)], 1) is not None  # gain 0.025, error 0.048
    assert no_gain([(rows[0],), (rows[1] - 0.1,)], 1) is None
    assert no_gain([(rows[0],)], 1) is None


def test_the_anchored_reference_leans_on_who_is_sure(recipe: Recipe, tmp_path: Path) -> None:
    rows = 9 * torch.randn(16, 4, generator=torch.Generator().manual_seed(3))
    plan, data = make_plan(recipe), [LearningTask(0, [rows])]
    aim, own = (
        make_objective(reference, "logits", data, plan, net).references[0][0]
        for reference in ("anchored", "expert")
    )
    assert torch.allclose(aim, own, atol=1e-5)  # the base says the same of all: it knows nothing
    both = make_objective("anchored", "logits", [*data, LearningTask(1, [rows])], plan, net)
    assert both.weights == pytest.approx([1, 1], abs=1e-4)
    still = LearningTask(1, [torch.zeros(8, 4)])  # an expert that says nothing here: half and half
    unsure = make_objective("anchored", "logits", [*data, still], plan, net)
    assert unsure.weights == pytest.approx([4 / 3, 2 / 3], abs=1e-4)
    double = 4 / 3 * make_objective("expert", "logits", data, plan, net).losses(net_of_base())[0]
    assert unsure.losses(net_of_base())[0] == pytest.approx(double, rel=1e-3)
    swapped = Recipe.model_validate(
        {**recipe.as_data(), "base": recipe.experts[0].path,
         "experts": [{"path": recipe.base}, {"path": recipe.experts[1].path}]}
    )  # fmt: skip
    aim = make_objective("anchored", "logits", data, make_plan(swapped), net).references[0][0]
    assert torch.allclose(aim, own, atol=1e-5)  # now the base knows, and the expert does not
    equal = swapped.model_copy(update={"experts": (swapped.experts[1], swapped.experts[1])})
    equal = equal.model_copy(update={"base": equal.experts[0].path})
    half, one = (
        make_objective(reference, "logits", data, make_plan(equal), net).references[0][0]
        for reference in ("anchored", "expert")
    )
    assert torch.allclose(half, one, atol=1e-6)
    lone = recipe.model_copy(update={"base": None})
    with pytest.raises(RecipeError, match="add --base PATH"):
        make_objective("anchored", "logits", data, make_plan(lone), net)


def journal(path: Path, key: str = "k", seed: int = 0) -> Journal:
    pytest.importorskip("optuna")
    return Journal(["task_arithmetic", "ties"], path, key, budget=6, seed=seed)


@pytest.mark.filterwarnings("ignore")
def test_a_killed_search_goes_on_where_it_was(recipe: Recipe, tmp_path: Path) -> None:
    class Killed(Length):
        def losses(self, module: nn.Module) -> tuple[NDArray[np.float64], ...]:
            if len(self.seen) == 4:
                raise KeyboardInterrupt
            return super().losses(module)

    first, then = Killed(length(recipe)), Length(length(recipe))
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, journal(tmp_path / "j"), first, net)
    found = tune(recipe, journal(tmp_path / "j"), then, net)
    assert len(found.tried) == 12 and len(then.seen) == 8
    again = Length(length(recipe))
    assert tune(recipe, journal(tmp_path / "j"), again, net).tried == found.tried
    assert again.seen == []
    with pytest.raises(OutputError, match="of another search"):
        journal(tmp_path / "j", key="other")
    (tmp_path / "text").write_text("no journal\n")
    with pytest.raises(OutputError, match="is no journal"):
        journal(tmp_path / "text")


@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_a_journal(recipe: Recipe, tmp_path: Path) -> None:
    one, two = journal(tmp_path / "j"), journal(tmp_path / "j", seed=1)
    trying, aim = Trying(recipe, net), Length(length(recipe))
    open_ = [(one, one.ask()), (two, two.ask())]
    assert open_[0][1] != open_[1][1]
    while open_:
        strategy, asked = open_.pop(0)
        for candidate in asked:
            strategy.tell(candidate, aim.losses(trying.put(candidate)))
            if following := strategy.ask():
                open_.append((strategy, following))
    assert [each for each, _ in one.done()] == [each for each, _ in two.done()]
    assert len(one.done()) in (12, 13) and len(aim.seen) == len(one.done())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_lost_machine_of_a_cluster_is_made_up_for(recipe: Recipe) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from mergewell.tune.on_ray import judge_on_ray
    from mergewell.tune.trying import judge_here

    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    tried = candidates(["ties", "dare", "task_arithmetic"], budget=6)
    aim = Length(length(recipe), pause_s=0.5)
    with judge_here(recipe, Length(length(recipe)), net) as judge:
        here = {each.choice.__repr__(): losses for each, losses in judge(tried)}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    found: dict[str, tuple[NDArray[np.float64], ...]] = {}
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        with judge_on_ray(recipe, aim, net) as judge:
            for candidate, losses in judge(tried):
                if not found:
                    cluster.remove_node(nodes[1], allow_graceful=False)
                found[candidate.choice.__repr__()] = losses
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert found.keys() == here.keys()
    assert all(np.array_equal(found[key][0], here[key][0]) for key in here)


def test_what_excludes_each_other_is_said(recipe: Recipe, tmp_path: Path) -> None:
    plan = make_plan(recipe)

    def given(
        *, search: str = "grid", engine: str = "here", journal: str | None = None,
        reference: str | None = None, data: Sequence[str] = (),
    ) -> None:  # fmt: skip
        tune_given(
            plan, net, [], methods=["ties"], search=search, engine=engine, journal=journal,
            metric=lambda module: 1.0, reference=reference, data=data,
        )  # fmt: skip

    with pytest.raises(RecipeError, match="exclude each other"):
        given(reference="mix")
    with pytest.raises(RecipeError, match="does not look at --data"):
        given(data=["a.npz"])

    with pytest.raises(RecipeError, match="add --journal FILE"):
        given(search="optuna")
    with pytest.raises(RecipeError, match="of --search optuna alone"):
        given(journal="j")
    with pytest.raises(RecipeError, match="nothing to share out"):
        given(search="line", engine="ray")
    with pytest.raises(RecipeError, match="--search grd"):
        given(search="grd")


def test_the_command_takes_metrics_and_labels(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "nets_by_metric.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Linear(4, 3, bias=False)\n"
        f"def near(module):\n    return -abs(float(module.weight.norm()) - {length(recipe)})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["--base", str(recipe.base), "--model-factory", "nets_by_metric:net"]
    labelled: Sequence[str] = []
    for place, expert in enumerate(recipe.experts):
        rows = torch.zeros(8, 4)
        generator = torch.Generator().manual_seed(place)
        rows[:, 2 * place : 2 * place + 2] = torch.randn(8, 2, generator=generator)
        labels = (rows @ make_plan(recipe).experts[place]["weight"].T).argmax(-1)
        np.savez(tmp_path / f"{place}.npz", x=rows.numpy(), labels=labels.numpy())
        flags += ["--expert", expert.path]
        labelled = [*labelled, "--data", str(tmp_path / f"{place}.npz")]
    near = ["--metric", "nets_by_metric:near"]
    tuned = ["tune", *flags, "--method", "task_arithmetic", "--json"]
    assert main([*tuned, *near, "--search", "line"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"]["method"]["scale"] == pytest.approx(1.0, rel=0.06)
    assert (found["metric"], found["reference"]) == ("nets_by_metric:near", None)
    assert main([*tuned, *labelled, "--metric", "labels", "--patience", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidates"][0]["divergence"]["value"] == -1.0  # all right: accuracy 1
    assert found["stopped"].startswith("Stopped after 5 of 10")
    assert main([*tuned, "--metric", "labels"]) == 2
    assert main([*tuned, "--metric", "nets_by_metric:far"]) == 2
    assert "cannot be imported" in capsys.readouterr().err
    assert main(["learn", "greedy_soup", *flags, *near, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["score"] == max(trial["score"] for trial in found["trials"]) < 0
