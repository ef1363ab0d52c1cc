"""The learners on a convolutional network in channels-last order and on a small language model."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import cnn, images, llama, randomised, tokens
from safetensors.torch import save_file
from torch import nn

from mergewell.descent.tasks import LearningTask
from mergewell.learners.base import LEARNERS, Material, judged
from mergewell.recipe import Recipe, make_recipe

SETTINGS: dict[str, dict[str, Any]] = {
    "adarank": {"steps": 2, "rate": 0.01, "mask_rate": 0.2},
    "concrete": {"steps": 2, "rate": 0.2},
    "symerge": {"steps": 2, "rate": 0.01},
    "dwise_ft": {"steps": 2},
    "lorahub": {"steps": 3},
    "df_merge": {"random": 2, "steps": 1, "samples": 1},
}
LAYERS = {"cnn": "head.*", "llama": "*layers.2.mlp.down_proj.weight"}


def channels_last() -> nn.Module:
    # gradients of such weights are not contiguous
    return cnn().to(memory_format=torch.channels_last)  # pyright: ignore


FACTORIES = {"cnn": channels_last, "llama": llama}


@cache
def tasks_of(kind: str) -> list[LearningTask]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found: list[LearningTask] = []
        for k in range(2):
            batch = images(4) if kind == "cnn" else tokens(4)
            labels = torch.randint(5, (4,) if kind == "cnn" else (4, 7))
            found.append(LearningTask(k, [batch], [labels]))
        return found


def recipe_of(kind: str, folder: Path) -> Recipe:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = FACTORIES[kind]()
    for number in range(3):
        state = randomised(base, number, 0.0 if number == 0 else 0.05)
        save_file({n: t.contiguous() for n, t in state.items()}, folder / f"{number}.safetensors")
    paths = [str(folder / f"{number}.safetensors") for number in range(3)]
    return make_recipe({"base": paths[0], "experts": [{"path": path} for path in paths[1:]]})


@pytest.mark.parametrize("kind", FACTORIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_learner_s_recipe_merges_to_a_model_that_moved(
    tmp_path: Path, kind: str, name: str
) -> None:
    recipe, tasks = recipe_of(kind, tmp_path), tasks_of(kind)

    def sureness(module: nn.Module) -> float:
        with torch.no_grad():
            logits = torch.cat([task.logits(module, task.batches[0]) for task in tasks])
        return float(logits.double().softmax(-1).max(-1).values.mean())

    settings = dict(SETTINGS[name])
    if "folder" in LEARNERS.get(name).model_fields:
        settings["folder"] = str(tmp_path / "out")
    if name == "symerge":
        settings["layer"] = LAYERS[kind]
    material = Material(FACTORIES[kind], sureness, tasks)
    learned = LEARNERS.build(name, settings).learn(recipe, material)
    assert math.isfinite(learned.score)
    found = judged(learned.recipe, material, sureness)
    if name == "df_merge":
        assert found == pytest.approx(learned.score, rel=1e-4)
    unmoved = judged(make_recipe({"experts": [{"path": recipe.base}]}), material, sureness)
    at_base = {expert.coefficient for expert in learned.recipe.experts} == {0.0}
    assert (found == pytest.approx(unmoved, rel=1e-9)) == at_base
