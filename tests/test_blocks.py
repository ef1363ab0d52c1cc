"""Every method gives the same bits from small blocks as from whole tensors, ties and all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toys import family, recipe_of

from mergewell import blocks
from mergewell.device import Device
from mergewell.methods.base import METHODS
from mergewell.plan import Plan, make_plan
from mergewell.run import merge_tensors
from mergewell.tensor_group import CHUNK, TensorGroup

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


@pytest.mark.parametrize(
    "method",
    [{"name": "ties", "rescale": "norm"}, {"name": "della", "rescale": "norm"}],
    ids=lambda m: str(m["name"]),
)
def test_what_no_fused_form_covers_comes_to_the_torch_form_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, object]
) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = {"matrix": (700, 300), "long_rows": (2, 100_000), "flat": (150_000,)}
    paths = [tmp_path / f"{model}.safetensors" for model in range(3)]
    for path in paths:
        state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file({name: tensor.bfloat16() for name, tensor in state.items()}, path)
    plan = make_plan(recipe_of(paths[0], paths[1:], method))
    whole = dict(merge_tensors(plan))
    sizes: list[int] = []

    def merge(plan: Plan, block: blocks.Block, group: TensorGroup, device: Device) -> blocks.Merged:
        sizes.append(block.stop - block.start)
        return merge_group(plan, block, group, device)

    merge_group = blocks._merge_group  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(blocks, "_merge_group", merge)
    monkeypatch.setattr(blocks, "_LARGEST", CHUNK)
    pieces = dict(merge_tensors(plan))
    assert all(torch.equal(whole[name], pieces[name]) for name in shapes)
    by_rows = method["name"] == "della"
    assert sum(sizes) == 700 * 300 + 200_000 + 150_000
    assert max(sizes) == (150_000 if by_rows else CHUNK), "no piece holds less than a row"
