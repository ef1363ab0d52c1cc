"""Mixtures of dense models: equal experts are one model, and prompts find their expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

pytest.importorskip("transformers")
from language_toys import IDS, WORDS, family, inputs, loaded, logits
from test_tokenizers import words

from mergewell.errors import ModelError, PlanError, RecipeError
from mergewell.mixture.choice import is_mixture, make_mixture
from mergewell.mixture.gates import make_gates
from mergewell.mixture.write import write_mixture
from mergewell.recipe import read_recipe
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import verify_files

ONE = "base: a, experts_per_token: 1"
MIXTURES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3 mixture"}


def mixture(folder: Path, text: str) -> Any:
    data = YAML(typ="safe").load(text)
    assert is_mixture(data)
    return make_mixture(data, where="moe.yaml", base_dir=folder)


def with_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(words([f"w{i}" for i in range(WORDS)]))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("name", MIXTURES)
def test_equal_experts_are_one_model(name: str, tmp_path: Path) -> None:
    base, _ = family(name, tmp_path, experts=0)
    three = ", ".join(["{source_model: base}"] * 3)
    text = f"{{base_model: base, gate_mode: random, experts: [{three}]}}"
    write_mixture(mixture(tmp_path, text), tmp_path / "out")
    made = loaded(MIXTURES[name], tmp_path / "out")
    torch.testing.assert_close(
        logits(name, made), logits(name, loaded(name, base)), rtol=0, atol=2e-6
    )
    given = inputs(name)
    assert made.generate(**given, max_new_tokens=4, min_new_tokens=4).shape == (4, IDS.shape[1] + 4)
    assert verify_files(tmp_path / "out") == []


def test_experts_stand_in_their_places(tmp_path: Path) -> None:
    base, (one, two) = family("llama", tmp_path)
    text = (
        "{base_model: base, gate_mode: uniform_random, dtype: bfloat16, "
        "experts: [{source_model: expert0}, {source_model: expert1}]}"
    )
    made = mixture(tmp_path, text)
    write_mixture(made, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    models = [load_file(folder / "model.safetensors") for folder in (base, one, two)]
    layer = "model.layers.1"
    for number, model in enumerate(models[1:]):
        for old, new in [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")]:
            expert = found[f"{layer}.block_sparse_moe.experts.{number}.{new}.weight"]
            assert torch.equal(expert, model[f"{layer}.mlp.{old}.weight"].bfloat16())
    query = f"{layer}.self_attn.q_proj.weight"
    assert torch.equal(found[query], models[0][query].bfloat16())
    gate = found[f"{layer}.block_sparse_moe.gate.weight"]
    assert gate.shape == (2, 16)
    assert 0.1 < float(gate.abs().max()) <= 0.25
    other = write_mixture(made.model_copy(update={"seed": 1}), tmp_path / "other")
    again = write_mixture(made, tmp_path / "again")
    first = json.loads((tmp_path / "out" / "manifest.json").read_text())["outputs"][0]["hash"]
    assert again.outputs[0].hash == first
    assert other.outputs[0].hash != first


def test_prompts_make_gates(tmp_path: Path) -> None:
    base, _ = family("llama", tmp_path, experts=0)
    with_tokenizer(base)
    with open_checkpoint(base) as checkpoint:
        table = checkpoint["model.embed_tokens.weight"]

        def text(mode: str, negative: str = "") -> str:
            more = f", negative_prompts: [{negative}]" if negative else ""
            return (
                f"{{base_model: base, gate_mode: {mode}, experts: ["
                f"{{source_model: base, positive_prompts: [w4 w5, w6]{more}}},"
                "{source_model: base, positive_prompts: [w9 w8]}]}"
            )

        def gates(mode: str, negative: str = "") -> torch.Tensor:
            return make_gates(mixture(tmp_path, text(mode, negative)), checkpoint, 2, 16)

        cheap = gates("cheap_embed")
        unit = torch.nn.functional.normalize
        assert cheap.shape == (2, 2, 16)
        shared = "positive_prompts: [w9 w8]}], shared_experts: [{source_model: base, prompts: [w7]"
        more = mixture(tmp_path, text("cheap_embed").replace("positive_prompts: [w9 w8]", shared))
        all_three = make_gates(more, checkpoint, 2, 16)
        assert torch.equal(all_three[:, :2], cheap)
        torch.testing.assert_close(all_three[0, 2], unit(table[7], dim=0))
        torch.testing.assert_close(cheap[1, 0], unit(table[[4, 5, 6]].sum(0), dim=0))
        less = unit(table[[4, 5, 6]].sum(0), dim=0) - unit(table[7], dim=0)
        torch.testing.assert_close(gates("cheap_embed", "w7")[0, 0], unit(less, dim=0))
        model = loaded("llama", base)

        def states(ids: list[int]) -> torch.Tensor:
            with torch.no_grad():
                output = model(torch.tensor([ids]), output_hidden_states=True)
            return torch.stack(output.hidden_states[:-1])[:, 0]

        hidden = gates("hidden")
        due = (states([4, 5])[:, -1] + states([6])[:, -1]) / 2
        torch.testing.assert_close(hidden[:, 0], unit(due, dim=1), rtol=1e-5, atol=1e-6)
        average = gates("hidden_avg")
        torch.testing.assert_close(
            average[:, 1], unit(states([9, 8]).mean(1), dim=1), rtol=1e-5, atol=1e-6
        )
        with pytest.raises(PlanError, match="cancel"):
            gates("cheap_embed", "w4 w5, w6")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate_mode: hidden, experts: [{source_model: a}]", "'base'"),
        ("base: a, gate_mode: hiden, experts: [{source_model: a}]", "gate = 'hiden'"),
        (f"{ONE}, gate_mode: hidden, experts: [{{path: a}}]", "expert 1 has none"),
        (
            f"{ONE}, gate_mode: hidden, experts: [{{path: a, prompts: [x]}}], "
            "shared_experts: [{path: a}]",
            "shared expert 1 has none",
        ),
        ("base: a, gate_mode: random, architecture: qwen, experts: [{path: a}]", "architecture:"),
        ("base: a, gate_mode: random, experts: [{path: a}]", "experts_per_token is 2, of 1"),
        (f"{ONE}, gate_mode: random, experts: [{{path: a, noise_scale: -1}}]", "noise = -1"),
        (
            "base: a, gate_mode: cheap_embed, experts: [{path: a, prompts: [x]}, "
            "{path: b, prompts: [x]}]",
            "nothing tells them apart",
        ),
    ],
)
def test_what_makes_no_mixture_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        mixture(tmp_path, f"{{{text}}}")


def test_models_that_make_no_mixture(tmp_path: Path) -> None:
    family("llama", tmp_path, experts=1)
    family("gpt2 conv1d", tmp_path / "gpt2", experts=0)
    family("qwen3", tmp_path / "qwen3", experts=0)

    def refused(text: str, message: str, kind: type[Exception] = PlanError) -> None:
        with pytest.raises(kind, match=message):
            write_mixture(mixture(tmp_path, text), tmp_path / "out")

    one = "gate_mode: random, experts_per_token: 1, experts:"
    refused(
        f"{{base_model: gpt2/base, {one} [{{source_model: gpt2/base}}]}}", "architecture 'gpt2'"
    )
    refused(
        f"{{base_model: base, {one} [{{source_model: qwen3/base}}]}}", "'qwen3', but .* of 'llama'"
    )
    shared = "[{source_model: base}], shared_experts: [{source_model: base}]"
    refused(
        f"{{base_model: base, {one} {shared}}}",
        "shared_experts: MixtralForCausalLM.*remove the key",
    )
    family("qwen2 tied", tmp_path / "qwen2", experts=0)
    refused(
        f"{{base_model: qwen2/base, {one} [{{source_model: qwen2/base}}]}}",
        "shared_experts: Qwen2MoeForCausalLM.*name one",
    )
    refused(
        "{base: base, gate_mode: hidden, experts_per_token: 1, "
        "experts: [{path: base, prompts: [a]}]}",
        "no tokenizer",
        ModelError,
    )
    (tmp_path / "moe.yaml").write_text(f"{{base_model: base, {one} [{{source_model: base}}]}}")
    with pytest.raises(RecipeError, match=r"only `mergewell plan` and `mergewell merge` take it"):
        read_recipe(tmp_path / "moe.yaml")


def test_a_shared_expert_is_for_all_tokens(tmp_path: Path) -> None:
    base, (one,) = family("qwen2 tied", tmp_path, experts=1)
    text = (
        "{base_model: base, gate_mode: random, experts: [{source_model: base}, "
        "{source_model: base}], shared_experts: [{source_model: expert0, residual_scale: 0}]}"
    )
    made = mixture(tmp_path, text)
    write_mixture(made, tmp_path / "silent")
    silent = loaded("qwen2 mixture", tmp_path / "silent")
    due = logits("qwen2 tied", loaded("qwen2 tied", base))
    torch.testing.assert_close(logits("qwen2 mixture", silent), due, rtol=0, atol=2e-6)
    loud = made.shared_experts[0].model_copy(update={"scale": 0.5})
    made = made.model_copy(update={"shared_experts": (loud,)})
    write_mixture(made, tmp_path / "loud")
    found = load_file(tmp_path / "loud" / "model.safetensors")
    state = load_file(one / "model.safetensors")
    for name, scale in [("up_proj", 1), ("down_proj", 0.5)]:
        own = state[f"model.layers.1.mlp.{name}.weight"]
        stored = found[f"model.layers.1.mlp.shared_expert.{name}.weight"]
        torch.testing.assert_close(stored, scale * own)
    with open_checkpoint(base) as checkpoint:
        gates = make_gates(made, checkpoint, 2, 16)
    assert torch.equal(found["model.layers.1.mlp.gate.weight"], gates[1, :2])
    assert torch.equal(found["model.layers.1.mlp.shared_expert_gate.weight"], gates[1, 2:])


def test_noise_is_of_its_size_and_seed(tmp_path: Path) -> None:
    base, _ = family("llama", tmp_path, experts=0)
    text = (
        "{base_model: base, gate_mode: random, experts_per_token: 1, seed: 3, "
        "experts: [{source_model: base, noise_scale: 0.25}]}"
    )
    made = mixture(tmp_path, text)
    manifest = write_mixture(made, tmp_path / "out")
    assert manifest.tensors_changed == 2 + 6  # gates, and three matrices a layer
    name = "model.layers.0.block_sparse_moe.experts.0"
    found = load_file(tmp_path / "out" / "model.safetensors")
    state = load_file(base / "model.safetensors")
    noise = [found[f"{name}.{new}.weight"] - state[f"model.layers.0.mlp.{old}.weight"]
             for old, new in [("gate_proj", "w1"), ("up_proj", "w3")]]  # fmt: skip
    assert 0.2 < float(noise[0].std()) < 0.3
    assert abs(float(torch.corrcoef(torch.stack([n.flatten() for n in noise]))[0, 1])) < 0.2
    assert write_mixture(made, tmp_path / "again").outputs[0].hash == manifest.outputs[0].hash
