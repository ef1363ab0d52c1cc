"""Every error that headers show is raised by the plan, which reads no tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import save_adapter
from toys import family, recipe_of, save, tensors

from mergewell.errors import CheckpointError, PlanError
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import merge_tensors
from mergewell.storage.base import Checkpoint
from mergewell.storage.checkpoint import open_checkpoint


def test_a_plan_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = family(tmp_path, shards=2)

    def forbidden(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Checkpoint, "read", forbidden)
    plan = make_plan(recipe_of(base, experts, {"name": "ties"}))
    data = plan.as_data(2)
    elements = 400 * 200 + 300 * 500 + 300 + 64 * 75 + 1
    assert data["write_bytes"] == 2 * elements + 8
    assert data["read_bytes"] == 4 * 2 * elements * 4 + 8  # 4 models, 4 passes; one copy
    assert data["passes"] == 4
    assert {t["name"]: t["method"] for t in data["tensors"]}["steps"] == "copy"


def broken(tmp_path: Path, **changes: torch.Tensor | None) -> tuple[Path, list[Path]]:
    base, experts = family(tmp_path)
    state = {**tensors(1), **changes}
    save(experts[1], {n: t for n, t in state.items() if t is not None})
    return base, experts


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer.0.bias": None}, r"expert1: layer\.0\.bias is missing, but in .*base; .*rule"),
        ({"layer.0.bias": torch.zeros(5)}, r"expert1: layer\.0\.bias has shape \[5\], but \[300\]"),
        ({"head.weight": torch.zeros(5)}, r"expert1: head\.weight is not in .*omit: true"),
        ({"layer.0.bias": torch.zeros(300, dtype=torch.int64)}, r"is torch\.int64, but torch\.bf"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, changes: dict, sentence: str) -> None:
    base, experts = broken(tmp_path, **changes)
    with pytest.raises(PlanError, match=sentence):
        make_plan(recipe_of(base, experts, {"name": "average"}))


def test_what_a_method_needs_is_asked_for(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    paths = [{"path": str(e)} for e in experts]
    with pytest.raises(PlanError, match="ties needs the base"):
        make_plan(make_recipe({"experts": paths, "method": {"name": "ties"}}))
    with pytest.raises(PlanError, match="slerp takes 2 experts, but 3 are named"):
        make_plan(recipe_of(base, experts, {"name": "slerp"}))
    zero = [{"path": str(e), "coefficient": c} for e, c in zip(experts, (1, -1, 0), strict=True)]
    with pytest.raises(PlanError, match="coefficients sum to 0"):
        make_plan(make_recipe({"experts": zero}))


def test_configurations_of_other_architectures_are_refused(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    (base / "config.json").write_text(json.dumps({"vocab_size": 10, "architectures": ["A"]}))
    (experts[0] / "config.json").write_text(json.dumps({"vocab_size": 10, "architectures": ["B"]}))
    assert "architectures" in make_plan(recipe_of(base, experts, {"name": "average"})).warnings[0]
    (experts[2] / "config.json").write_text(json.dumps({"vocab_size": 11}))
    with pytest.raises(PlanError, match=r"expert2: config\.json says vocab_size = 11"):
        make_plan(recipe_of(base, experts, {"name": "average"}))


def test_rules_that_match_nothing_or_everything_are_refused(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    nothing = recipe_of(base, experts, {"name": "average"}, rules=[{"match": "decoder.*"}])
    with pytest.raises(PlanError, match=r"'decoder\.\*' matches no tensor"):
        make_plan(nothing)
    all_out = recipe_of(base, experts, {"name": "average"}, rules=[{"match": "*", "omit": True}])
    with pytest.raises(PlanError, match="leave out every tensor"):
        make_plan(all_out)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        make_plan(recipe_of(base, [*experts, tmp_path / "nowhere"], {"name": "average"}))


def test_a_model_named_twice_is_warned_of(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    plan = make_plan(recipe_of(base, [experts[0], experts[0]], {"name": "average"}))
    assert plan.warnings == (f"{experts[0]} is named twice.",)


def test_keeping_an_adapter_s_tensor_writes_the_base_s_dtype(tmp_path: Path) -> None:
    base, _ = family(tmp_path, experts=1)
    factors = {
        "layer.0.lora_A.weight": torch.full((1, tensors(0)["layer.0.weight"].shape[1]), 0.5),
        "layer.0.lora_B.weight": torch.ones(tensors(0)["layer.0.weight"].shape[0], 1),
    }
    adapter = save_adapter(tmp_path / "adapter", factors, base_model_name_or_path="a/stranger")
    recipe = make_recipe(
        {
            "base": str(base),
            "experts": [{"path": str(adapter)}],
            "method": {"name": "average"},
            "rules": [{"match": "layer.0.weight", "method": {"name": "keep", "model": 1}}],
        }
    )
    plan = make_plan(recipe)
    held = open_checkpoint(base)
    task = plan.tasks["layer.0.weight"]
    assert (task.spec.dtype, task.copied_from) == (held.spec(task.name).dtype, None)
    assert any("trained on a/stranger" in warning for warning in plan.warnings)
    merged = dict(merge_tensors(plan))["layer.0.weight"]
    expected = held["layer.0.weight"].double() + 2 * 0.5  # alpha 2 over rank 1
    assert torch.equal(merged, expected.to(merged.dtype))
