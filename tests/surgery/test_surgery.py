"""Surgery: by hand, what no training leaves alone, what training gains, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from families import factory, tiny_family
from torch import nn

from mergewell.cli.main import main
from mergewell.descent.tasks import LearningTask
from mergewell.distil.outputs import first, seeing, with_first
from mergewell.errors import CheckpointError, DataError, ModelError, OutputError, RecipeError
from mergewell.learners.base import LEARNERS, Material
from mergewell.models.loader import load_state
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors, run
from mergewell.surgery.companion import load_corrected, open_corrections, task_names
from mergewell.surgery.correction import Corrected, Correction, started
from mergewell.surgery.learner import SurgeryLearner
from mergewell.surgery.training import Schooling, representations, school


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.act = nn.Linear(6, 6), nn.Tanh()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + self.act(self.map(x)), "beside"


class Deep(nn.Module):
    """Two blocks that return tuples, and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([Residual(), Residual()])
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)[0]
        return self.norm(x)


def deep() -> nn.Module:
    return Deep().eval()


def deep_family(folder: Path, count: int) -> Recipe:
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = deep().state_dict()
        save_file(base, folder / "base.safetensors")
        for number in range(count):
            moved = {n: t + 0.4 * torch.randn_like(t) for n, t in base.items()}
            save_file(moved, folder / f"{number}.safetensors")
    return recipe_of(
        folder / "base.safetensors", [folder / f"{n}.safetensors" for n in range(count)]
    )


def recipe_of(base: Path, experts: list[Path]) -> Recipe:
    return make_recipe({"base": str(base), "experts": [{"path": str(path)} for path in experts]})


def tasks(count: int, batches: int = 2) -> list[LearningTask]:
    generator = torch.Generator().manual_seed(3)
    return [
        LearningTask(k, [torch.randn(16, 4, generator=generator) for _ in range(batches)])
        for k in range(count)
    ]


def learner(name: str, folder: Path, **settings: object) -> SurgeryLearner:
    built = LEARNERS.build(name, {"folder": str(folder), "rank": 4, **settings})
    assert isinstance(built, SurgeryLearner)
    return built


def companion(folder: Path) -> Path:
    (found,) = folder.glob("*.companion.safetensors")
    return found


def test_a_correction_by_hand() -> None:
    """z = (1, -2), D = (1, 1; 0, -1): relu(-1, 2) = (0, 2); U = (5, 1; 7, 0.5) adds (2, 1)."""
    correction = Correction(
        torch.tensor([[1.0, 1.0], [0.0, -1.0]]), torch.tensor([[5.0, 1.0], [7.0, 0.5]])
    )
    z = torch.tensor([[1.0, -2.0]])
    assert correction(z).tolist() == [[-1.0, -3.0]]
    assert torch.equal(correction(z[:, None])[:, 0], correction(z))  # tokens
    image = z[:, :, None, None].expand(1, 2, 3, 5)
    assert torch.equal(correction(image), correction(z)[:, :, None, None].expand(1, 2, 3, 5))
    with pytest.raises(ModelError, match="of 2 nodes was given a representation of 3"):
        correction(torch.zeros(1, 3))


def test_a_new_correction_does_nothing_and_depends_on_its_seed() -> None:
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    one, other = (started(7, 3, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(one(z), z)
    assert not torch.equal(one.down, other.down)
    assert float(one.down.detach().abs().max()) <= 7**-0.5


def test_bias_and_gradient_by_hand() -> None:
    """Identity network, target z - 1: the bias is 1, and one step of Adam moves U by its rate."""
    net = nn.Identity()
    batch = torch.tensor([[2.0], [4.0]])
    how = Schooling(rank=1, steps=0, rate=0.5, seed=0)
    untouched = school(net, [batch], [{"": batch - 1}], how)
    assert (untouched.before, untouched.after) == (1.0, 1.0)
    moved = school(net, [batch], [{"": batch - 1}], replace(how, steps=1)).corrections[""]
    down = float(started(1, 1, torch.Generator().manual_seed(0)).down.detach())
    # only where relu lets the representation through does U feel anything
    assert float(moved.up.detach()) == pytest.approx(0.5 if down > 0 else 0.0, rel=1e-4)


@pytest.mark.parametrize("name", ["surgery", "surgery_v2"])
def test_without_steps_the_module_is_the_merged_model(tmp_path: Path, name: str) -> None:
    recipe = deep_family(tmp_path, 2)
    method = {"name": "task_arithmetic", "scale": 0.3}
    how = learner(name, tmp_path / "c", steps=0, method=method)
    learned = how.learn(recipe, Material(deep, tasks=tasks(2)))
    wanted = make_recipe({**recipe.as_data(), "method": method})
    assert learned.recipe == wanted.model_copy(update={"notes": learned.recipe.notes})
    assert learned.trials[0].score == learned.score < 0
    plan = make_plan(learned.recipe)
    run(plan, tmp_path / "merged", workers=1)
    plain = deep()
    load_state(plain, dict(merge_tensors(plan)))
    corrected = load_corrected(tmp_path / "merged", companion(tmp_path / "c"), "1", deep)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(corrected(x), plain(x))


@pytest.mark.parametrize("name", ["surgery", "surgery_v2"])
def test_training_brings_each_task_near_to_its_expert(tmp_path: Path, name: str) -> None:
    recipe, given = deep_family(tmp_path, 2), tasks(2)
    how = learner(name, tmp_path / "c", steps=150, rate=0.01)
    learned = how.learn(recipe, Material(deep, tasks=given))
    before, after = (-trial.score for trial in learned.trials)
    assert after < 0.6 * before
    assert f"bias {after:.4g}" in learned.recipe.notes[-1]
    plan = make_plan(recipe)
    run(plan, tmp_path / "merged", workers=1)
    path = companion(tmp_path / "c")
    expert = deep()
    load_state(expert, dict(plan.experts[1]))
    own, other = (load_corrected(tmp_path / "merged", path, task, deep) for task in ("1", "0"))
    with torch.no_grad():
        distances = [
            float(torch.cat([(net(x) - expert(x)).abs() for x in given[1].batches]).mean())
            for net in (own, other)
        ]
    assert distances[0] < 0.7 * distances[1]
    again = learner(name, tmp_path / "d", steps=150, rate=0.01)
    again.learn(recipe, Material(deep, tasks=given))
    assert companion(tmp_path / "d").read_bytes() == path.read_bytes()


def test_v2_corrects_the_blocks_and_the_end(tmp_path: Path) -> None:
    recipe = deep_family(tmp_path, 1)
    learner("surgery_v2", tmp_path / "c", steps=1, at="norm").learn(
        recipe, Material(deep, tasks=tasks(1))
    )
    file = open_corrections(companion(tmp_path / "c"))
    assert file.metadata["places"] == '["blocks.0", "blocks.1", "norm"]'
    assert file.spec("0/1/down").shape == (4, 6)


def test_training_leaves_the_module_as_it_was() -> None:
    net = deep().train()
    batch = torch.randn(4, 4)
    targets = representations(net, ["blocks.0", ""], [batch])
    school(net, [batch], targets, Schooling(2, 3, 0.1, 0))
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(part._forward_hooks for part in net.modules())
    assert torch.equal(representations(net, [""], [batch])[0][""], targets[0][""])


def test_padding_neither_teaches_nor_counts() -> None:
    class Tokens(nn.Module):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return x * 1.0

    mask = torch.tensor([[1, 1, 0]])
    batch = {"x": torch.ones(1, 3, 2), "attention_mask": mask}
    target = torch.zeros(1, 3, 2)
    target[0, 2] = 1e6
    schooled = school(Tokens(), [batch], [{"": target}], Schooling(2, 0, 0.1, 0))
    assert schooled.before == 1.0


def test_the_first_tensor_is_seen_and_exchanged() -> None:
    nested = ("text", {"a": torch.zeros(2), "b": torch.ones(1)})
    assert torch.equal(first(nested, ""), torch.zeros(2))
    exchanged = with_first(nested, torch.full((2,), 7.0))
    assert exchanged[0] == "text" and exchanged[1]["a"].tolist() == [7.0, 7.0]
    with pytest.raises(ModelError, match="The network returns no tensor"):
        first(("text",), "")
    with pytest.raises(ModelError, match="has no module 'head'"), seeing(deep(), ["head"]):
        pass


def test_names_of_tasks() -> None:
    found = task_names(["a/mnist.safetensors", "b/x", "c/x", "usps.task_vector.safetensors"])
    assert found == ("mnist", "x#2", "x#3", "usps")


def test_mistakes_are_refused(tmp_path: Path) -> None:
    base, experts = tiny_family(tmp_path, 2)
    recipe = recipe_of(base, experts)
    whole = Material(factory, tasks=tasks(2))
    with pytest.raises(RecipeError, match=r"name a folder for it with --set folder=DIR"):
        LEARNERS.build("surgery", {}).learn(recipe, whole)
    with pytest.raises(OutputError, match="is a file"):
        learner("surgery", base).learn(recipe, whole)
    short = learner("surgery", tmp_path / "c", steps=2)
    with pytest.raises(DataError, match="no inputs of expert 2's task"):
        short.learn(recipe, Material(factory, tasks=tasks(1)))
    with pytest.raises(DataError, match="inputs for each of 2 experts by itself"):
        short.learn(recipe, Material(factory, tasks=[replace(tasks(1)[0], expert=None)]))
    with pytest.raises(ModelError, match="has no module 'neck'"):
        learner("surgery", tmp_path / "c", at="neck").learn(recipe, whole)
    with pytest.raises(ModelError, match="no repeated blocks to correct; use surgery"):
        learner("surgery_v2", tmp_path / "c").learn(recipe, whole)
    short.learn(recipe, whole)
    path = companion(tmp_path / "c")
    with pytest.raises(CheckpointError, match="belongs to another merged model"):
        load_corrected(base, path, "0", factory)
    with pytest.raises(CheckpointError, match="holds no corrections"):
        load_corrected(base, base, "0", factory)
    run(make_plan(recipe), tmp_path / "merged", workers=1)
    with pytest.raises(RecipeError, match="knows no task 'mnist'"):
        load_corrected(tmp_path / "merged", path, "mnist", factory)
    with pytest.raises(ModelError, match="has no module 'neck'"):
        Corrected(factory(), {"neck": started(3, 1, torch.Generator())})


def test_from_the_command_line_to_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, data = deep_family(tmp_path, 2), tasks(2)
    nets = ModuleType("nets_of_this_test")
    nets.deep = deep  # pyright: ignore
    monkeypatch.setitem(sys.modules, nets.__name__, nets)
    given = ["--base", str(recipe.base), "--model-factory", "nets_of_this_test:deep"]
    for task, expert in zip(data, recipe.experts, strict=True):
        inputs = tmp_path / f"{Path(expert.path).stem}.npz"
        np.savez(inputs, x=torch.cat([*task.batches]).numpy())
        given += ["--expert", expert.path, "--data", str(inputs)]
    out, folder = tmp_path / "recipe.yaml", tmp_path / "c"
    settings = ["--set", f"folder={folder}", "--set", "steps=5", "--set", "rank=2"]
    assert main(["learn", "surgery", *given, *settings, "--out", str(out)]) == 0
    assert "has to know the task" in capsys.readouterr().err
    merged = tmp_path / "merged"
    assert main(["merge", str(out), "--out", str(merged)]) == 0
    corrected = load_corrected(merged, companion(folder), "0", deep)
    assert corrected(torch.zeros(1, 4)).shape == (1, 6)
    restore = ["restore", str(merged), "--companion", str(companion(folder)), "--expert", "0"]
    assert main([*restore, "--out", str(tmp_path / "back")]) == 2
    assert "make the module of a task with" in capsys.readouterr().err
