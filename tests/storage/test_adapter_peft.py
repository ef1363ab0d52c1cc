"""A LoRA adapter merged at coefficient 1 against PEFT's own output, on toy models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft_toys import bert, gpt2, llama, logits, trained  # noqa: E402 - only if both are there

pytestmark = pytest.mark.filterwarnings("ignore")  # of both, about their own future

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, "layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"q_proj": 5},
        },
    ),
    "dora": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "lora_bias": (llama, {"target_modules": ["q_proj"], "lora_bias": True}),
    "biases": (llama, {"target_modules": ["q_proj"], "bias": "all"}),
    "embedding": (
        llama, {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "classifier": (
        bert,
        {"target_modules": ["query", "bert.embeddings.word_embeddings"], "task_type": "SEQ_CLS"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_adapter_at_coefficient_1_is_itself(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    make, config = CASES[name]
    make().save_pretrained(tmp_path / "base")
    cls = type(make())
    path = trained(tmp_path / "a", tmp_path / "base", cls, 1, config)
    base = cls.from_pretrained(tmp_path / "base")
    before = logits(base)
    due = logits(peft.PeftModel.from_pretrained(base, path))
    recipe = make_recipe({"base": str(tmp_path / "base"), "experts": [{"path": str(path)}]})
    manifest = run(make_plan(recipe), tmp_path / "out")
    assert {Path(f.path).name for f in manifest.inputs} == {
        "model.safetensors", "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip
    merged = logits(cls.from_pretrained(tmp_path / "out"))
    assert float((due - before).abs().max()) > 1e-3
    assert float((merged - due).abs().max()) < 1e-6


def test_adapters_of_two_ranks_add_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    cls = transformers.LlamaForCausalLM
    targets = {"target_modules": ["q_proj", "down_proj"]}
    paths = [
        trained(tmp_path / f"a{rank}", tmp_path / "base", cls, rank, {"r": rank, **targets})
        for rank in (2, 5)
    ]
    # the definition, by PEFT's own change of each weight
    summed = cls.from_pretrained(tmp_path / "base")
    for path, coefficient in zip(paths, (0.7, -0.4), strict=True):
        alone = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), path)
        for layer, target in zip(
            alone.base_model.model.model.layers, summed.model.layers, strict=True
        ):
            query, down = layer.self_attn.q_proj, layer.mlp.down_proj
            target.self_attn.q_proj.weight.data += coefficient * query.get_delta_weight("default")
            target.mlp.down_proj.weight.data += coefficient * down.get_delta_weight("default")
    recipe = make_recipe(
        {
            "base": str(tmp_path / "base"),
            "experts": [
                {"path": str(paths[0]), "coefficient": 0.7},
                {"path": str(paths[1]), "coefficient": -0.4},
            ],
            "method": {"name": "task_arithmetic", "scale": 1.0},
        }
    )
    run(make_plan(recipe), tmp_path / "out")
    merged = logits(cls.from_pretrained(tmp_path / "out"))
    assert float((merged - logits(summed)).abs().max()) < 1e-6
