"""Companions of EMR merges and TALL masks: a merged file and one bit an element give experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from toys import family

from mergewell.companions.base import COMPANIONS, expert_state, write_companion
from mergewell.companions.emr import Emr
from mergewell.companions.tall_masks import TallMasks
from mergewell.errors import CheckpointError, OutputError, RecipeError
from mergewell.plan import Plan, make_plan
from mergewell.recipe import make_recipe
from mergewell.run import run
from mergewell.storage.checkpoint import Checkpoint, open_checkpoint

CASES = [
    (Emr(), {"name": "emr"}),
    (Emr(rescale="tensor_means"), {"name": "emr", "scale": 0.5}),
    (TallMasks(), {"name": "task_arithmetic", "scale": 1.0}),
    (TallMasks(), {"name": "task_arithmetic", "scale": 0.3}),
    (TallMasks(), {"name": "ties", "density": 1.0}),
]


def made(
    folder: Path, method: dict[str, object], experts: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Plan, Checkpoint]:
    """A plan, and its merge in a folder."""
    base, paths = family(folder, experts, dtype=dtype)
    data = {"base": str(base), "experts": [{"path": str(p)} for p in paths], "method": method}
    plan = make_plan(make_recipe(data))
    run(plan, folder / "merged", workers=1)
    return plan, open_checkpoint(folder / "merged")


def by_hand(folder: Path, base: list[float], *experts: list[float], **method: object) -> Plan:
    for name, values in {"base": base, **{f"e{i}": e for i, e in enumerate(experts)}}.items():
        save_file({"w": torch.tensor(values)}, folder / f"{name}.safetensors")
    recipe = make_recipe(
        {
            "base": str(folder / "base.safetensors"),
            "experts": [{"path": str(folder / f"e{i}.safetensors")} for i in range(len(experts))],
            "method": method,
        }
    )
    plan = make_plan(recipe)
    run(plan, folder / "merged", workers=1)
    return plan


def task_vectors(plan: Plan, state: dict[str, Tensor]) -> dict[str, Tensor]:
    assert plan.base is not None
    return {
        name: state[name].double() - plan.base[name].double()
        for name, task in plan.tasks.items()
        if task.copied_from is None
    }


@pytest.mark.parametrize(("companion", "method"), CASES)
def test_one_expert_is_given_back(
    tmp_path: Path, companion: Emr | TallMasks, method: dict[str, object]
) -> None:
    plan, merged = made(tmp_path, method, experts=1)
    path = write_companion(companion, plan, ["only"], tmp_path / "companion.safetensors")
    state = expert_state(merged, path, "only")
    assert set(state) == set(plan.experts[0])
    for name, tensor in plan.experts[0].items():
        assert state[name].dtype == tensor.dtype
        assert torch.allclose(state[name], tensor, atol=2e-6), name


def test_emr_by_hand(tmp_path: Path) -> None:
    """Task vectors (2, -1, 1, 0) and (1, 3, -2, 0): unified (2, 3, -2, 0)."""
    plan = by_hand(tmp_path, [1.0] * 4, [3.0, 0.0, 2.0, 1.0], [2.0, 4.0, -1.0, 1.0], name="emr")
    path = write_companion(Emr(), plan, ["a", "b"], tmp_path / "c.safetensors")
    masks = open_checkpoint(path)
    assert masks["w.mask"].tolist() == [[0b10000000], [0b11100000]]
    assert masks["rescalers"].tolist() == [4 / 2, 6 / 7]
    merged = open_checkpoint(tmp_path / "merged")
    assert expert_state(merged, path, "a")["w"].tolist() == [5.0, 1.0, 1.0, 1.0]
    expected = [1 + 12 / 7, 1 + 18 / 7, 1 - 12 / 7, 1.0]
    assert expert_state(merged, path, "b")["w"].tolist() == pytest.approx(expected)


def test_tall_masks_by_hand(tmp_path: Path) -> None:
    """Task vectors (4, 1) and (-1, 4), sum (3, 5), threshold 0.4: 4 >= 0.4, 1 < 1.6, 1 < 1.6."""
    plan = by_hand(tmp_path, [0.0, 0.0], [4.0, 1.0], [-1.0, 4.0], name="task_arithmetic", scale=0.5)
    path = write_companion(TallMasks(), plan, ["a", "b"], tmp_path / "c.safetensors")
    masks = open_checkpoint(path)
    assert masks["w.mask"].tolist() == [[0b10000000], [0b01000000]]
    assert masks["rescalers"].tolist() == [2.0, 2.0]
    merged = open_checkpoint(tmp_path / "merged")
    assert expert_state(merged, path, "a")["w"].tolist() == [3.0, 0.0]
    assert expert_state(merged, path, "b")["w"].tolist() == [0.0, 5.0]
    lower = write_companion(
        TallMasks(threshold=(0.4, 0.2)), plan, ["a", "b"], tmp_path / "d.safetensors"
    )
    assert open_checkpoint(lower)["w.mask"].tolist() == [[0b10000000], [0b11000000]]


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_emr_restores_the_size_of_every_task_vector(tmp_path: Path, scale: float) -> None:
    """The paper's rescalers make the sum of magnitudes the expert's own, whatever the scale."""
    plan, merged = made(tmp_path, {"name": "emr", "scale": scale})
    path = write_companion(Emr(), plan, ["a", "b", "c"], tmp_path / "c.safetensors")
    for task, expert in zip("abc", plan.experts, strict=True):
        own = task_vectors(plan, dict(expert))
        got = task_vectors(plan, expert_state(merged, path, task))
        sizes = [sum(float(t.abs().sum()) for t in each.values()) for each in (own, got)]
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-4)
        for name, tau in got.items():
            assert bool((tau * own[name] >= 0).all()), name


def test_the_masked_model_points_more_to_its_expert_than_the_merge(tmp_path: Path) -> None:
    for place, (companion, method) in enumerate(CASES):
        plan, merged = made(tmp_path / str(place), method)
        path = write_companion(companion, plan, ["a", "b", "c"], tmp_path / "c.safetensors")
        own = task_vectors(plan, dict(plan.experts[1]))
        got = task_vectors(plan, expert_state(merged, path, "b"))
        plain = task_vectors(plan, dict(merged))
        assert cosine(got, own) > cosine(plain, own) + 0.1


def cosine(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    one, other = (torch.cat([t.flatten() for t in each.values()]) for each in (left, right))
    return float(one @ other / (one.norm() * other.norm()))


def test_the_size_is_one_bit_an_element_and_expert(tmp_path: Path) -> None:
    plan, merged = made(tmp_path, {"name": "emr"}, dtype=torch.bfloat16)
    path = write_companion(Emr(), plan, ["a", "b", "c"], tmp_path / "c.safetensors")
    elements = sum(
        spec.numel for name, spec in merged.specs.items() if plan.tasks[name].copied_from is None
    )
    content = open_checkpoint(path).content_bytes
    assert 3 * elements / 8 <= content <= 3 * elements / 8 + 3 * len(merged) + 24
    assert content < merged.content_bytes / 5  # 3 bits beside 16


def test_integers_and_copied_tensors_are_the_merged_ones(tmp_path: Path) -> None:
    plan, merged = made(tmp_path, {"name": "emr"})
    path = write_companion(Emr(), plan, ["a", "b", "c"], tmp_path / "c.safetensors")
    assert "steps.mask" not in open_checkpoint(path)
    assert expert_state(merged, path, "a")["steps"].item() == 7


def test_the_base_is_found_or_given(tmp_path: Path) -> None:
    plan, merged = made(tmp_path, {"name": "emr"})
    path = write_companion(Emr(), plan, ["a", "b", "c"], tmp_path / "c.safetensors")
    moved = tmp_path / "elsewhere"
    (tmp_path / "base").rename(moved)
    with pytest.raises(CheckpointError, match="does not exist"):
        expert_state(merged, path, "a")
    assert expert_state(merged, path, "a", base=open_checkpoint(moved))


def test_mistakes_are_refused(tmp_path: Path) -> None:
    plan, merged = made(tmp_path, {"name": "emr"})
    path = tmp_path / "c.safetensors"
    with pytest.raises(RecipeError, match="tall_masks goes with merges by task_arithmetic or ties"):
        write_companion(TallMasks(), plan, ["a", "b", "c"], path)
    with pytest.raises(RecipeError, match="one name for each of 3 experts"):
        write_companion(Emr(), plan, ["a", "b", "b"], path)
    with pytest.raises(RecipeError, match="2 values are given for 3 experts"):
        other = make_plan(
            plan.recipe.model_copy(
                update={"method": make_recipe({"experts": [{"path": "x"}],
                        "method": {"name": "task_arithmetic"}}).method}
            )
        )  # fmt: skip
        write_companion(TallMasks(threshold=(0.1, 0.2)), other, ["a", "b", "c"], path)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))
    write_companion(Emr(), plan, ["a", "b", "c"], path)
    with pytest.raises(RecipeError, match="knows no task 'd'"):
        expert_state(merged, path, "d")
    with pytest.raises(CheckpointError, match="belongs to another merge"):
        expert_state(plan.experts[0], path, "a")
    with pytest.raises(CheckpointError, match="is no companion"):
        expert_state(merged, tmp_path / "base" / "model.safetensors", "a")
    with pytest.raises(OutputError, match="could not be written"):
        write_companion(Emr(), plan, ["a", "b", "c"], tmp_path / "c.safetensors" / "d")
    negative = [{"path": e.path, "coefficient": -1.0} for e in plan.recipe.experts]
    recipe = make_recipe({**plan.recipe.as_data(), "experts": negative})
    with pytest.raises(RecipeError, match="coefficient is not above 0"):
        write_companion(Emr(), make_plan(recipe), ["a", "b", "c"], path)


def test_the_metadata_say_what_it_is(tmp_path: Path) -> None:
    plan, _ = made(tmp_path, {"name": "emr"})
    path = write_companion(Emr(), plan, ["a", "b", "c"], tmp_path / "c.safetensors")
    metadata = open_checkpoint(path).metadata
    assert metadata["companion"] == "emr"
    assert json.loads(metadata["tasks"]) == ["a", "b", "c"]
    assert json.loads(metadata["parameters"]) == {"rescale": "elements"}
    assert {"emr", "mass", "smile", "tall_masks"} <= set(COMPANIONS.names())
