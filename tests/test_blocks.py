"""Every method gives the same bits from small blocks as from whole tensors, ties and all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import family, recipe_of

from mergewell.methods.base import METHODS
from mergewell.plan import make_plan
from mergewell.run import merge_tensors
from mergewell.tensor_group import CHUNK

SETTINGS: list[dict[str, object]] = [
    *({"name": n} for n in METHODS.names() if not METHODS.get(n).needs.calibration),
    {"name": "m_ties", "budget": "none"},  # guided: tests/test_guidance.py
    {"name": "m_dare", "budget": "none"},
    {"name": "arcee_fusion", "spread": 0.0},
    {"name": "breadcrumbs", "combine": "agreeing", "rescale": "norm", "gamma": 0.05},
    {"name": "breadcrumbs", "trim_scope": "row"},
    {"name": "dare", "rescale": "norm"},
    {"name": "della", "rescale": "norm", "epsilon": 0.2},
    {"name": "lines", "density": 0.3, "combine": "agreeing", "layers": 2},
    {"name": "metagpt", "scope": "tensor"},
    {"name": "model_stock", "scope": "row"},
    {"name": "multislerp", "of": "task_vectors"},
    {"name": "nuslerp", "along": "row", "of": "task_vectors"},
    {"name": "nuslerp", "along": "column"},
    {"name": "pcb", "scope": "tensor"},
    {"name": "ram", "plus": True},
    {"name": "sce", "density": 0.3},
    {"name": "ties", "rescale": "norm"},
    {"name": "ties", "rescale": "norm", "trim_scope": "model", "density": 0.01},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    # bfloat16 changes take few values, so that thresholds cut through ties
    return family(tmp_path_factory.mktemp("models"), experts=3, dtype=torch.bfloat16)


@pytest.mark.parametrize("method", SETTINGS, ids=lambda m: "-".join(map(str, m.values())))
def test_blocks_do_not_show(models: tuple[Path, list[Path]], method: dict[str, object]) -> None:
    parameters = {key: value for key, value in method.items() if key != "name"}
    count = METHODS.build(str(method["name"]), parameters).needs.experts or 3
    base, experts = models
    plan = make_plan(recipe_of(base, experts[:count], method, dtype="float32"))
    whole = dict(merge_tensors(plan, block=64 * CHUNK))
    small = dict(merge_tensors(plan, block=CHUNK))
    assert all(torch.equal(whole[name], small[name]) for name in whole)
