"""Merging files: the same bytes whatever the threads and blocks, and right ones."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import family, recipe_of, save, tensors

from mergewell.errors import CheckpointError, PlanError
from mergewell.methods.base import METHODS
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import merge_tensors, run
from mergewell.statistics.inner_products import InnerProducts
from mergewell.storage.manifest import read_manifest, verify_files
from mergewell.tensor_group import CHUNK, TensorGroup

VARIANTS = [
    {"name": "average"},
    {"name": "task_arithmetic", "scale": 0.4},
    {"name": "ties", "density": 0.3},
    {"name": "ties", "density": 0.3, "trim_scope": "model"},
    {"name": "dare", "density": 0.3, "rescale": "norm"},
    {"name": "metagpt"},
]


def digest(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("method", VARIANTS, ids=lambda m: "-".join(map(str, m.values())))
def test_threads_blocks_and_runs_give_the_same_bytes(tmp_path: Path, method: dict) -> None:
    base, experts = family(tmp_path, shards=2)
    found = set()
    for run_number, (workers, block) in enumerate(
        [(1, CHUNK), (1, CHUNK), (4, CHUNK), (4, 2 * CHUNK), (2, 64 * CHUNK)]
    ):
        out = tmp_path / f"out{run_number}"
        run(make_plan(recipe_of(base, experts, method)), out, workers=workers, block=block)
        found.add(tuple(sorted(digest(out).items())))
    assert len(found) == 1


def test_hash_seeds_give_the_same_bytes(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    hashes, seeds = set(), set()
    for seed in ("1", "2"):
        out = tmp_path / f"out{seed}"
        code = (
            "import sys; from mergewell.cli.main import main; print(hash('a'));"
            "sys.exit(main(sys.argv[1:]))"
        )
        flags = [f for e in experts for f in ("--expert", str(e))]
        ran = subprocess.run(
            [sys.executable, "-c", code, "merge", "--base", str(base), *flags,
             "--method", "dare", "--out", str(out)],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        seeds.add(ran.stdout.splitlines()[0])
        hashes.add(tuple(digest(out).items()))
    assert len(seeds) == 2, "the hash seeds must differ, or this test shows nothing"
    assert len(hashes) == 1


UNGUIDED = [
    *({"name": name} for name in METHODS.names() if not METHODS.get(name).needs.calibration),
    {"name": "m_ties", "budget": "none"},
    {"name": "m_dare", "budget": "none"},
]
"""Methods that no calibration guides; the others are seen in tests/test_guidance.py and theirs."""


@pytest.mark.parametrize("choice", UNGUIDED, ids=lambda choice: choice["name"])
def test_a_file_holds_what_the_method_gives_in_memory(
    tmp_path: Path, choice: dict[str, str]
) -> None:
    count = METHODS.get(choice["name"]).needs.experts or 3
    base, experts = family(tmp_path, count, dtype=torch.float32)
    plan = make_plan(recipe_of(base, experts, choice))
    run(plan, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    models = [load_file(folder / "model.safetensors") for folder in (base, *experts)]
    groups: dict[str, TensorGroup] = {}
    for tensor in (n for n in written if written[n].is_floating_point()):
        first, *rest = (model[tensor].double() for model in models)
        ones = torch.ones(count, dtype=torch.float64)
        groups[tensor] = TensorGroup(tensor, tuple(rest), ones, first)
    # a method may have another for some tensors, such as embeddings
    methods = {tensor: plan.tasks[tensor].method for tensor in groups}
    whole = {s for m in methods.values() for s in m.statistics() if s.scope == "model"}
    values = {
        s: s.measure([groups[t] for t, m in methods.items() if s in m.statistics()]) for s in whole
    }
    for tensor, group in groups.items():
        known = {s: value[tensor] for s, value in values.items() if tensor in value}
        expected = methods[tensor].merge(replace(group, statistics=known)).float()
        if methods[tensor].needs.granularity == "matrix":  # decompositions round by thread
            torch.testing.assert_close(written[tensor], expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(written[tensor], expected), tensor


def test_merging_in_memory_is_merging_into_files(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    plan = make_plan(recipe_of(base, experts, {"name": "ties"}))
    run(plan, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    held = dict(merge_tensors(plan))
    assert held.keys() == written.keys()
    assert all(torch.equal(held[name], written[name]) for name in held)


def test_trimming_over_the_whole_model_is_that_of_one_long_tensor(tmp_path: Path) -> None:
    base, experts = family(tmp_path, experts=2, dtype=torch.float32)
    plan = make_plan(
        recipe_of(base, experts, {"name": "ties", "density": 0.1, "trim_scope": "model"})
    )
    merged = dict(merge_tensors(plan))
    names = sorted(n for n in merged if merged[n].is_floating_point())
    models = [load_file(folder / "model.safetensors") for folder in (base, *experts)]
    flat = [torch.cat([m[n].double().flatten() for n in names]) for m in models]
    group = TensorGroup("all", tuple(flat[1:]), torch.ones(2, dtype=torch.float64), flat[0])
    expected = METHODS.build("ties", {"density": 0.1}).merge(group).float()
    assert torch.equal(torch.cat([merged[n].flatten() for n in names]), expected)


def test_small_tensors_do_not_keep_a_whole_model_from_the_fused_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"large": 300 * 300, "small": 7}
    state = {name: torch.linspace(-1, 1, size) for name, size in sizes.items()}
    scaled = [{n: t * (1 + i) for n, t in state.items()} for i in range(3)]
    models = [save(tmp_path / str(i), s, torch.float32) for i, s in enumerate(scaled)]
    plan = make_plan(recipe_of(models[0], models[1:], {"name": "metagpt"}))
    expected = {n: t * (1 + 1 * 0.2 + 2 * 0.8) for n, t in state.items()}  # shares 1 : 4
    for name, merged in merge_tensors(plan):
        assert torch.allclose(merged, expected[name], rtol=1e-6)

    def refuse(*_: object) -> None:
        raise AssertionError("the torch form holds a block of every model in float64")

    monkeypatch.setattr(InnerProducts, "update", refuse)
    assert {name for name, _ in merge_tensors(plan)} == {*sizes}


def test_one_expert_comes_back_bitwise(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        base, experts = family(tmp_path / str(dtype), experts=1, dtype=dtype)
        method = {"name": "task_arithmetic", "scale": 1.0}
        merged = dict(merge_tensors(make_plan(recipe_of(base, experts, method))))
        expert = load_file(experts[0] / "model.safetensors")
        assert all(torch.equal(merged[name], expert[name]) for name in expert)


def test_the_manifest_tells_what_was_done_and_the_folder_verifies(tmp_path: Path) -> None:
    base, experts = family(tmp_path, shards=2)
    (base / "config.json").write_text('{"model_type": "toy"}')
    recipe = recipe_of(base, experts, {"name": "average"}, seed=3)
    run(make_plan(recipe), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.tensors, manifest.tensors_changed, manifest.seed) == (6, 5, 3)
    assert len(manifest.inputs) == 8 and all(
        i.hash.startswith("xxh3-128:") for i in manifest.inputs
    )
    assert make_recipe(manifest.recipe) == recipe
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "toy"}'
    assert verify_files(tmp_path / "out") == []
    shard = next((tmp_path / "out").glob("model-00001*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert len(verify_files(tmp_path / "out")) == 1


def test_nothing_changed_is_an_error(tmp_path: Path) -> None:
    base, _ = family(tmp_path)
    same = save(tmp_path / "same", load_file(base / "model.safetensors"))
    with pytest.raises(PlanError, match="equals the base"):
        run(make_plan(recipe_of(base, [same], {"name": "average"})), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_and_refused(tmp_path: Path, value: float) -> None:
    base, experts = family(tmp_path)
    state = tensors(1)
    state["layer.0.weight"][3, 4] = value
    save(experts[1], state)
    with pytest.raises(CheckpointError, match=r"expert1.*layer\.0\.weight holds 1 NaN or Inf"):
        run(make_plan(recipe_of(base, experts, {"name": "ties"})), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unequal_integers_are_refused_unless_a_rule_keeps_one(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    state = load_file(experts[0] / "model.safetensors")
    save(experts[0], {**state, "steps": torch.tensor(9)})
    with pytest.raises(CheckpointError, match="integers of steps differ"):
        run(make_plan(recipe_of(base, experts, {"name": "average"})), tmp_path / "out")
    rules = [{"match": "steps", "method": {"name": "keep", "model": 1}}]
    kept = recipe_of(base, experts, {"name": "average"}, rules=rules)
    assert int(dict(merge_tensors(make_plan(kept)))["steps"]) == 9


def test_rules_choose_methods_coefficients_and_omissions(tmp_path: Path) -> None:
    base, experts = family(tmp_path, experts=2, dtype=torch.float32)
    rules = [
        {"match": "*.bias", "method": {"name": "keep", "model": 2}},
        {"match": "embed.*", "coefficients": [1.0, 3.0]},
        {"match": "scale", "omit": True},
    ]
    merged = dict(
        merge_tensors(make_plan(recipe_of(base, experts, {"name": "average"}, rules=rules)))
    )
    first, second = (load_file(e / "model.safetensors") for e in experts)
    assert "scale" not in merged
    assert torch.equal(merged["layer.0.bias"], second["layer.0.bias"])
    expected = 0.25 * first["embed.weight"].double() + 0.75 * second["embed.weight"].double()
    torch.testing.assert_close(merged["embed.weight"], expected.float())


def test_the_output_dtype_can_be_chosen_and_overflow_is_refused(tmp_path: Path) -> None:
    base, experts = family(tmp_path, dtype=torch.float32)
    recipe = recipe_of(base, experts, {"name": "average"}, dtype="float16")
    merged = dict(merge_tensors(make_plan(recipe)))
    assert {t.dtype for t in merged.values()} == {torch.float16, torch.int64}
    state = {n: t * 1e6 if n == "scale" else t for n, t in tensors(1).items()}
    save(experts[0], state, torch.float32)
    with pytest.raises(PlanError, match=r"scale: the merged values overflow torch\.float16"):
        run(make_plan(recipe), tmp_path / "out")
