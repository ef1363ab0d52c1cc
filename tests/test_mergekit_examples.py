"""The YAML of mergekit's documentation, on toy models: it runs, or is refused by its key.

Sources: arcee-ai/mergekit, `examples/*.yml`, README.md (Tokenizer Configuration, Chat Template),
`docs/multimerge.md`, `docs/evolve.md` and issues, with models renamed and layers counted anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from parity.mergekit_cases import LAYERS, state, write_models

from mergewell.errors import RecipeError, UserError
from mergewell.plan import make_plan
from mergewell.recipe import read_recipe
from mergewell.run import run
from mergewell.storage.checkpoint import open_checkpoint

EXAMPLES = {
    "linear.yml": """
models:
  - {model: A, parameters: {weight: 1.0}}
  - {model: B, parameters: {weight: 0.3}}
  - {model: C, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
""",
    "bio-merge.yml": """
models:
  - {model: A, parameters: {density: 0.5, weight: 0.5}}
  - {model: B, parameters: {density: 0.5, weight: 0.5}}
merge_method: ties
base_model: BASE
parameters: {normalize: false, int8_mask: true}
dtype: float16
""",
    "ties.yml": """
models:
  - {model: A, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: B, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
  - {model: C, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
merge_method: ties
base_model: BASE
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "gradient-slerp.yml": f"""
slices:
  - sources: [{{model: A, layer_range: [0, {LAYERS}]}}, {{model: B, layer_range: [0, {LAYERS}]}}]
merge_method: slerp
base_model: A
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
    - {{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}}
    - {{value: 0.5}}
dtype: float16
""",
    "mega.yml": f"""
slices:
  - sources: [{{model: A, layer_range: [0, {LAYERS}]}}, {{model: B, layer_range: [0, {LAYERS}]}}]
merge_method: slerp
base_model: A
parameters: {{t: [{{filter: self_attn, value: [0, 0.5, 1]}}, {{value: 0.5}}]}}
dtype: float16
out_path: ./models/gradient-slerp
---
models:
  - {{model: ./models/gradient-slerp, parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}}}
  - model: C
    parameters: {{density: 0.33, weight: [{{filter: mlp, value: 0.5}}, {{value: 0}}]}}
merge_method: ties
base_model: BASE
parameters: {{normalize: true, int8_mask: true}}
dtype: float16
out_path: ./models/gradient-slerp-ties
""",
    "orcamini-platy-44layer.yml": f"""
slices:
  - sources: [{{model: A, layer_range: [0, {LAYERS - 1}]}}]
  - sources: [{{model: B, layer_range: [1, {LAYERS}]}}]
merge_method: passthrough
dtype: float16
""",
    "arcee_fusion.yml": """
models: [{model: A}, {model: B}]
merge_method: arcee_fusion
base_model: A
dtype: bfloat16
""",
    "multimerge.md": """
name: first-merge
merge_method: linear
models: [{model: A}, {model: B}]
parameters: {weight: 0.5}
---
name: second-merge
merge_method: slerp
base_model: first-merge  # the result above
models: [{model: C}]
parameters: {t: 0.5}
---
merge_method: dare_ties
base_model: BASE
models:
  - {model: second-merge, parameters: {density: 0.6, weight: 0.5}}
  - {model: C, parameters: {density: 0.8, weight: 0.5}}
""",
    "README union": """
merge_method: dare_ties
base_model: BASE
models:
  - {model: CHATML, parameters: {weight: 0.5, density: 0.5}}
  - {model: LLAMA3, parameters: {weight: 0.5, density: 0.5}}
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: CHATML}
    <|im_end|>: {source: CHATML}
    <|start_header_id|>: {source: LLAMA3, force: true}
    <|eot_id|>: {source: {kind: model_token, model: CHATML, token: <|im_end|>}}
    <|unused|>: {source: {kind: zero}}
  pad_to_multiple_of: 16
chat_template: chatml
""",
    "one module": """
merge_method: linear
modules: {default: {models: [{model: A}, {model: B}]}}
parameters: {weight: 0.5}
""",
    "README base": """
merge_method: linear
models: [{model: BASE}, {model: CHATML}]
parameters: {weight: 0.5}
tokenizer: {source: base}
""",
    "README path": """
merge_method: linear
models: [{model: BASE}, {model: CHATML}]
parameters: {weight: 0.5}
tokenizer_source: CHATML
chat_template: "auto"
""",
    "README jinja": """
merge_method: linear
models: [{model: A}, {model: B}]
parameters: {weight: 0.5}
chat_template: "{{ messages }}"
""",
    "adapters": """
merge_method: task_arithmetic
base_model: BASE
models:
  - {model: BASE+LORA, parameters: {weight: 1.0}}
  - {model: {model: {path: A}, lora: LORA}, parameters: {weight: 0.5}}
""",
    "adapter passed through": """
merge_method: passthrough
models: [{model: BASE+LORA}]
""",
}
REFUSED = {
    "pattern, before filter": (
        """
models: [{model: A}, {model: B}]
merge_method: slerp
base_model: A
parameters: {t: [{pattern: self_attn, value: 0.5}, {value: 0.5}]}
""",
        "the key 'pattern' is not known",
    ),
    "modules": (
        """
merge_method: linear
modules: {text_decoder: {models: [{model: A}]}, vision_tower: {models: [{model: B}]}}
""",
        "modules: only `default`, .* but not text_decoder, vision_tower; give `models`",
    ),
    "modules and models": (
        "{merge_method: linear, models: [{model: A}], modules: {default: {models: [{model: A}]}}}",
        "not two of them",
    ),
    "a method in a module": (
        "{merge_method: linear, modules: {default: {models: [{model: A}], merge_method: ties}}}",
        "modules.default: the key 'merge_method' is not known",
    ),
    "cabs.yml": (
        """
models: [{model: A}]
merge_method: cabs
base_model: A
default_n_val: 8
""",
        "the key 'default_n_val' is not known",
    ),
    "cabs alone": (
        "{models: [{model: A}], merge_method: cabs}", "merge_method 'cabs' is not known",
    ),
    "residual_weight": (
        f"""
slices:
  - {{sources: [{{model: A, layer_range: [0, {LAYERS}]}}], residual_weight: 0.5}}
merge_method: passthrough
""",
        "slices.0: the key 'residual_weight' is not known",
    ),
    "evolve.md": ("{genome: {models: [A, B], merge_method: ties}}", "no parameter 'genome'"),
    "embed_slerp": (
        """
models: [{model: A}, {model: B}]
merge_method: slerp
base_model: A
parameters: {t: 0.5, embed_slerp: true}
""",
        "slerp has no parameter 'embed_slerp'",
    ),
    "two results": (
        "{merge_method: linear, name: one, models: [{model: A, parameters: {weight: 1}}]}\n---\n"
        "{merge_method: linear, name: two, models: [{model: B, parameters: {weight: 1}}]}",
        "2 documents, and 'one', 'two' are each merged by no other",
    ),
    "a circle": (
        "{merge_method: linear, name: a, models: [{model: b, parameters: {weight: 1}}]}\n---\n"
        "{merge_method: linear, name: b, models: [{model: a, parameters: {weight: 1}}]}",
        "they merge each other",
    ),
    "one name": (
        "{merge_method: linear, name: a, models: [{model: A, parameters: {weight: 1}}]}\n---\n"
        "{merge_method: linear, name: a, models: [{model: B, parameters: {weight: 1}}]}",
        "two documents are called 'a'",
    ),
}  # fmt: skip


def with_tokens(source: Path, folder: Path, added: list[str], template: str | None) -> None:
    """Write a model of the same weights with more tokens and, if so, more rows."""
    from safetensors.torch import save_file
    from test_tokenizers import words

    tensors = dict(state(source.name, dtype=torch.bfloat16))
    config = json.loads((source / "config.json").read_text())
    tokens = [f"w{i}" for i in range(config["vocab_size"])]
    folder.mkdir(exist_ok=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.full((len(added), tensors[name].shape[1]), 0.5, dtype=torch.bfloat16)
        tensors[name] = torch.cat([tensors[name], rows])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["vocab_size"] += len(added)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(words(tokens, added))
    settings = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("examples"), dtype=torch.bfloat16)
    with_tokens(folder / "A", folder / "CHATML", ["<|im_start|>", "<|im_end|>"], "{{ 1 }}")
    headers = ["<|start_header_id|>", "<|eot_id|>", "<|unused|>"]
    with_tokens(folder / "B", folder / "LLAMA3", headers, None)
    for name in ("BASE", "A", "B"):
        with_tokens(folder / name, folder / name, [], None)
    down = "model.layers.0.mlp.down_proj"
    shape = state("BASE")[f"{down}.weight"].shape
    factors = {"A": torch.ones(1, shape[1]), "B": torch.ones(shape[0], 1)}
    save_adapter(folder / "LORA", {f"{down}.lora_{n}.weight": t for n, t in factors.items()})
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_plans_and_runs(name: str, toys: Path, tmp_path: Path) -> None:
    file = toys / f"{name.replace(' ', '-')}.yaml"
    file.write_text(EXAMPLES[name])
    plan = make_plan(read_recipe(file))
    run(plan, tmp_path / "out", workers=1)
    check_result(name, tmp_path / "out")


def check_result(name: str, out: Path) -> None:
    """Look at what is particular about an example's result."""
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    with open_checkpoint(out) as file:
        table = file["model.embed_tokens.weight"]
        down = file["model.layers.0.mlp.down_proj.weight"]
    words = state("BASE")["model.embed_tokens.weight"].shape[0]
    layers, rows = LAYERS, words
    if "float16" in EXAMPLES[name].rpartition("dtype: ")[2].split():
        assert table.dtype == torch.float16
    if name == "orcamini-platy-44layer.yml":
        layers = 2 * LAYERS - 2
    elif name == "README union":
        rows = -(-(words + 5) // 16) * 16
        assert "im_start" in (out / "chat_template.jinja").read_text()
        tokens = [
            e["content"] for e in json.loads((out / "tokenizer.json").read_text())["added_tokens"]
        ]
        assert tokens == [
            "<|im_start|>",
            "<|im_end|>",
            "<|start_header_id|>",
            "<|eot_id|>",
            "<|unused|>",
        ]
    elif name == "README path":
        rows = words + 2
        assert (out / "chat_template.jinja").read_text() == "{{ 1 }}"
    elif name == "README jinja":
        assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    elif name.startswith("adapter"):
        base = state("BASE", dtype=torch.bfloat16)["model.layers.0.mlp.down_proj.weight"].double()
        other = state("A", dtype=torch.bfloat16)["model.layers.0.mlp.down_proj.weight"].double()
        due = base + 2 if "passed" in name else base + 2 + 0.5 * (other + 2 - base)
        assert torch.equal(down, due.bfloat16())
    assert (config["num_hidden_layers"], config["vocab_size"], len(table)) == (layers, rows, rows)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_key(name: str, toys: Path) -> None:
    text, message = REFUSED[name]
    file = toys / f"refused-{name.replace(' ', '-')}.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_recipe(file)
    assert isinstance(caught.value, RecipeError)
