"""Ranges of layers stacked into one model: names, bytes, configuration, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import save

from mergewell.errors import CheckpointError, PlanError
from mergewell.plan import make_plan
from mergewell.recipe import LayerRange, make_recipe, read_recipe
from mergewell.run import run
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.layer_stack import LayerPiece, LayerStack, find_layers


def llama(seed: int, layers: int = 4) -> dict[str, Tensor]:
    """Return a toy decoder whose every element tells the model and the layer."""
    made = {"lm_head.weight": torch.full((5, 3), 100.0 * seed + 99)}
    made["model.embed_tokens.weight"] = torch.full((5, 3), 100.0 * seed + 98)
    made["model.norm.weight"] = torch.full((3,), 100.0 * seed + 97)
    for layer in range(layers):
        value = 100.0 * seed + layer
        made[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.arange(6.0).view(2, 3) / 8 + value
        made[f"model.layers.{layer}.input_layernorm.weight"] = torch.full((3,), value)
    return made


def write(folder: Path, seed: int, layers: int = 4, *, shards: int = 1) -> Path:
    save(folder, llama(seed, layers), torch.float32, shards)
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "layer_types": [f"{seed}-{layer}" for layer in range(layers)],
        "rope": {"n_layer": layers, "theta": 1, "num_layers": 7},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stack(*pieces: tuple[Path, int, int]) -> LayerStack:
    opened = {path: open_checkpoint(path) for path, _, _ in pieces}
    return LayerStack([LayerPiece(opened[path], start, stop) for path, start, stop in pieces])


def test_layers_are_renumbered_and_the_outside_comes_from_the_ends(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", 1), write(tmp_path / "two", 2)
    with stack((one, 0, 3), (two, 1, 4)) as stacked:
        firsts = [
            float(stacked[f"model.layers.{layer}.mlp.up_proj.weight"][0, 0]) for layer in range(6)
        ]
        assert firsts == [100, 101, 102, 201, 202, 203]
        assert float(stacked["model.embed_tokens.weight"][0, 0]) == 198
        assert float(stacked["model.norm.weight"][0]) == 297
        assert float(stacked["lm_head.weight"][0, 0]) == 299
        assert len(stacked) == 3 + 2 * 6
        assert {name for shard in stacked.shards for name in shard.names} == set(stacked)


def test_blocks_are_those_of_the_file(tmp_path: Path) -> None:
    one = write(tmp_path / "one", 1)
    with stack((one, 2, 4)) as stacked:
        block = stacked.read("model.layers.1.mlp.up_proj.weight", 2, 5)
        assert block.tolist() == [103.25, 103.375, 103.5]
        with pytest.raises(IndexError):
            stacked.read("model.layers.1.mlp.up_proj.weight", 2, 7)


def test_the_configuration_counts_the_stack(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", 1), write(tmp_path / "two", 2)
    with stack((one, 0, 2), (two, 3, 4)) as stacked:
        assert stacked.config == {
            "model_type": "llama",
            "num_hidden_layers": 3,
            "layer_types": ["1-0", "1-1", "2-3"],
            "rope": {"n_layer": 3, "theta": 1, "num_layers": 7},
        }
        assert json.loads(stacked.side_file(one / "config.json")) == stacked.config


def test_no_file_outgrows_its_sources(tmp_path: Path) -> None:
    one = write(tmp_path / "one", 1, shards=3)
    with stack((one, 0, 4), (one, 0, 4)) as stacked:
        largest = max(
            sum(stacked.spec(name).nbytes for name in shard.names) for shard in stacked.shards
        )
        with open_checkpoint(one) as source:
            sizes = [sum(source.spec(n).nbytes for n in shard.names) for shard in source.shards]
        assert largest <= max(sizes)
        assert len(stacked.shards) > 3


def test_a_recipe_stacks_base_and_expert_and_writes_the_configuration(tmp_path: Path) -> None:
    base, expert = write(tmp_path / "base", 1), write(tmp_path / "expert", 2)
    recipe = make_recipe(
        {
            "base": str(base),
            "base_layers": [{"start": 0, "stop": 1}, {"start": 3, "stop": 4}],
            "experts": [
                {"path": str(base), "layers": [{"start": 2, "stop": 4, "path": str(expert)}]}
            ],
            "method": {"name": "task_arithmetic", "scale": 0.5},
        }
    )
    run(make_plan(recipe), tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made["model.layers.0.input_layernorm.weight"].tolist() == [151.0] * 3  # 100 .. 202
    assert made["model.layers.1.input_layernorm.weight"].tolist() == [153.0] * 3  # 103 .. 203
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert make_recipe(recipe.as_data()) == recipe


def test_paths_of_ranges_are_relative_to_the_recipe(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        write(tmp_path / name, seed)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "{base: base, base_layers: [{start: 0, stop: 1}, {path: one, start: 1, stop: 2}],"
        " experts: [{path: two, layers: [{start: 0, stop: 2}]}], method: {name: average}}"
    )
    recipe = read_recipe(file)
    assert recipe.base_layers[1].path == str(tmp_path / "one")
    assert recipe.base_layers[0].path is None
    assert len(make_plan(recipe).tasks) == 3 + 2 * 2


def test_a_stack_of_one_model_may_be_copied_although_no_tensor_changes(tmp_path: Path) -> None:
    one = write(tmp_path / "one", 1)
    layers = [{"start": 0, "stop": 3}, {"start": 1, "stop": 4}]
    recipe = make_recipe(
        {"experts": [{"path": str(one), "layers": layers}], "method": {"name": "keep", "model": 1}}
    )
    manifest = run(make_plan(recipe), tmp_path / "out")
    assert manifest.tensors == 3 + 2 * 6
    plain = make_recipe({"experts": [{"path": str(one)}], "method": {"name": "keep", "model": 1}})
    with pytest.raises(PlanError, match="equals the base"):
        run(make_plan(plain), tmp_path / "out2")


@pytest.mark.parametrize(
    ("names", "prefix", "count"),
    [
        (["model.layers.0.a", "model.layers.1.a"], "model.layers", 2),
        (["h.0.attn.bias", "h.1.attn.bias", "h.2.attn.bias", "wte.weight"], "h", 3),
        (["encoder.layer.0.x", "encoder.layer.1.x", "decoder.layer.0.x"], "encoder.layer", 2),
        # the experts of a layer are longer, but not a list of layers
        ([f"m.layers.{i}.experts.{e}.w" for i in (0, 1) for e in range(8)], "m.layers", 2),
        # a list with gaps counts no layers
        (["conv.0.w", "conv.3.w", "conv.6.w", "blocks.0.w", "blocks.1.w"], "blocks", 2),
    ],
)
def test_layers_are_the_longest_list(names: list[str], prefix: str, count: int) -> None:
    found = find_layers(names, where="here")
    assert (found.prefix, found.count) == (prefix, count)
    assert found.split(f"{prefix}.1.rest.weight") == (1, "rest.weight")
    assert found.join(7, "rest.weight") == f"{prefix}.7.rest.weight"
    assert found.split(f"{prefix}x.1.rest") is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.weight"], "here: no tensor name counts layers"),
        (["text.layers.0.w", "image.layers.0.w"], "image.layers and text.layers both count 1"),
    ],
)
def test_unclear_layers_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_layers(names, where="here")


def test_ranges_and_names_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one", 1)
    with pytest.raises(CheckpointError, match=r"layers 2 to 5 are asked for, but it has 4"):
        stack((one, 2, 5))
    other = tmp_path / "other"
    save(other, {"h.0.w": torch.ones(2), "h.1.w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"counts its layers under h, but"):
        stack((one, 0, 2), (other, 0, 2))
    strange = [tmp_path / name for name in ("strange1", "strange2")]
    for path in strange:
        save(path, {"layers.0.w": torch.ones(2), "layers.1.w": torch.ones(2), "zz": torch.ones(1)})
    with pytest.raises(CheckpointError, match="not clear whether zz stands before or after"):
        stack((strange[0], 0, 1), (strange[1], 1, 2))
    with stack((strange[0], 0, 1), (strange[0], 0, 1)) as stacked:
        assert "zz" in stacked


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="stop must be above start"):
        LayerRange(start=2, stop=2)
