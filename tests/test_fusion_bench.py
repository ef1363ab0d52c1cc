"""Parity with FusionBench: its own results on toy models, made by tests/parity."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import merge_tensors

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from fusion_bench_cases import CASES, base, experts

TABLES = Path(__file__).parent / "parity" / "fusion_bench"

EXACT = 5e-6
"""Relative distance of merged task vectors; both compute in float32."""

DIFFERENT: dict[tuple[str, str], tuple[float, float, str]] = {
    **{
        ("model_stock", name): (1e-3, 0.05, "they average angles over pairs, we cosines")
        for name in ("first.weight", "first.bias", "norm.weight", "second.weight")
    },
    ("svc", "first.bias"): (0.1, 2.0, "they leave vectors as merged, we calibrate them too"),
    ("svc", "norm.weight"): (0.1, 2.0, "they leave vectors as merged, we calibrate them too"),
}
"""Where results differ: between which distances, and why."""


def ours(folder: Path, method: dict[str, Any]) -> dict[str, Tensor]:
    save_file(base(), folder / "base.safetensors")
    paths = [folder / f"{index}.safetensors" for index in range(len(experts()))]
    for path, state in zip(paths, experts(), strict=True):
        save_file(state, path)
    recipe = make_recipe(
        {
            "base": str(folder / "base.safetensors"),
            "experts": [{"path": str(path)} for path in paths],
            "method": method,
        }
    )
    return dict(merge_tensors(make_plan(recipe)))


@pytest.mark.parametrize("name", CASES)
def test_fusion_bench_merges_the_same(name: str, tmp_path: Path) -> None:
    merged = ours(tmp_path, CASES[name])
    theirs = load_file(TABLES / f"{name}.safetensors")
    assert theirs
    for tensor, value in theirs.items():
        moved = value - base()[tensor]
        apart = float((merged[tensor] - value).norm() / moved.norm())
        low, high, _ = DIFFERENT.get((name, tensor), (0.0, EXACT, ""))
        assert low <= apart <= high, (name, tensor, apart)
