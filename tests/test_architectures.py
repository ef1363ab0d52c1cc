"""Language models by transformers: checked, calibrated, merged, loaded, and made to write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from language_toys import IDS, MODELS, family, inputs, loaded, logits

from mergewell.calibration.data import Data
from mergewell.check import check
from mergewell.models.loader import ModuleSource
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import run

SLOW = {"mistral", "gemma2", "gemma3", "phi3 fused", "neox fused", "t5 gated", "bert classes",
        "qwen2 mixture"}  # fmt: skip
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS]
WITHOUT_M_LOSS = {"mixtral", "qwen3 mixture"}
"""Nothing but routed experts: which inputs a node sees is another question in every model."""


def recipe_of(base: Path, experts: list[Path], method: str, **parameters: object) -> Recipe:
    return make_recipe(
        {
            "base": str(base),
            "experts": [{"path": str(path)} for path in experts],
            "method": {"name": method, **parameters},
        }
    )


def checked(name: str, base: Path, experts: list[Path]):
    half = len(IDS) // 2
    given = inputs(name)
    batches = [{k: t[:half] for k, t in given.items()}, {k: t[half:] for k, t in given.items()}]
    data = Data(ModuleSource.parse(base).build, batches, len(IDS), gram=True)
    return check(make_plan(recipe_of(base, experts, "average")), ["a", "b"], data=data)


@pytest.mark.parametrize("name", NAMES)
def test_checked_merged_loaded_and_made_to_write(name: str, tmp_path: Path) -> None:
    base, experts = family(name, tmp_path)
    found = checked(name, base, experts)
    assert bool(found.layers) == (name not in WITHOUT_M_LOSS)
    assert all(layer.absolute > 1e-6 for layer in found.layers)
    for method, parameters in [("average", {}), ("ties", {"density": 0.4}), ("tsv", {})]:
        run(make_plan(recipe_of(base, experts, method, **parameters)), tmp_path / method)
        model = loaded(name, tmp_path / method)
        answer = logits(name, model)
        assert bool(answer.isfinite().all())
        assert not torch.allclose(answer, logits(name, loaded(name, base)), atol=1e-3)
    if model.can_generate():
        given = {key: inputs(name)[key] for key in ("input_ids", "attention_mask")}
        start = 1 if "t5" in name else IDS.shape[1]
        written = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert written.shape == (len(IDS), start + 4)


@pytest.mark.parametrize("name", NAMES)
def test_equal_experts_are_one_expert(name: str, tmp_path: Path) -> None:
    base, experts = family(name, tmp_path, experts=1)
    twice = experts * 2
    found = checked(name, base, twice)
    assert max((layer.absolute for layer in found.layers), default=0.0) < 1e-5
    expected = logits(name, loaded(name, experts[0]))
    run(make_plan(recipe_of(base, twice, "average")), tmp_path / "average")
    assert torch.equal(logits(name, loaded(name, tmp_path / "average")), expected)
    run(make_plan(recipe_of(base, twice, "ties", density=1.0)), tmp_path / "ties")
    torch.testing.assert_close(
        logits(name, loaded(name, tmp_path / "ties")), expected, rtol=0, atol=2e-6
    )
