"""The toy models and configurations that mergekit and mergewell both merge.

Imports torch and safetensors only, so that it runs in mergekit's own environment as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, VOCABULARY, LAYERS = 8, 12, 24, 4
STRIDE = 3
"""Every third element of the outputs stands in the tables."""

_BLOCK = {
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.k_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.v_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "mlp.gate_proj.weight": (INNER, HIDDEN),
    "mlp.up_proj.weight": (INNER, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INNER),
}
_SEEDS = {"BASE": 0, "A": 1, "B": 2, "C": 3}


def state(model: str, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a model's tensors: Gaussian, the experts a fifth of a standard deviation away."""
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _BLOCK.items()}

    def drawn(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    tensors = drawn(_SEEDS["BASE"])
    if model != "BASE":
        moved = drawn(_SEEDS[model])
        tensors = {name: tensor + 0.2 * moved[name] for name, tensor in tensors.items()}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_models(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write BASE, A, B and C as Llama folders."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": HIDDEN // 2, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    for model in _SEEDS:
        path = folder / model
        path.mkdir(parents=True)
        save_file(state(model, dtype=dtype), path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
    return folder


def models(*entries: tuple[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the `models` of a configuration."""
    return [
        {"model": name, **({"parameters": dict(found)} if found else {})} for name, found in entries
    ]


def slices(*pieces: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """Return the `slices` of a configuration."""
    return [
        {"sources": [{"model": m, "layer_range": [start, stop]} for m, start, stop in piece]}
        for piece in pieces
    ]


_TWO = models(("A", {"weight": 0.7}), ("B", {"weight": 0.5}))
_DENSE = models(("A", {"weight": 0.7, "density": 0.6}), ("B", {"weight": 0.5, "density": 0.3}))
_PLAIN = models(("A", {}), ("B", {}))
_THREE = models(("A", {"weight": 0.2}), ("B", {"weight": 0.5}), ("C", {"weight": 0.3}))
_GRADED = models(
    ("A", {"weight": 0.5, "density": 0.6}),
    ("B", {"weight": [0.1, 0.9], "density": [0.2, 0.8]}),
)

DETERMINISTIC: Mapping[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": _TWO},
    "linear_plain": {
        "merge_method": "linear", "models": _TWO, "parameters": {"normalize": False},
    },
    "linear_filters": {
        "merge_method": "linear",
        "models": models(
            ("A", {"weight": [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.5}]}),
            ("B", {"weight": [{"filter": "mlp", "value": 0.2}, {"filter": "*", "value": 0.9}]}),
        ),
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic", "base_model": "BASE", "models": _TWO,
        "parameters": {"lambda": 0.8},
    },
    "task_arithmetic_normalized": {
        "merge_method": "task_arithmetic", "base_model": "BASE",
        "models": models(("BASE", {}), ("A", {"weight": 0.7}), ("B", {"weight": -0.2})),
        "parameters": {"normalize": True},
    },
    "ties": {"merge_method": "ties", "base_model": "BASE", "models": _DENSE},
    "ties_gradients": {
        "merge_method": "ties", "base_model": "BASE", "models": _GRADED,
        "parameters": {"normalize": True, "lambda": 1.1},
    },
    "ties_sum": {
        "merge_method": "ties", "base_model": "BASE", "models": _DENSE,
        "parameters": {"normalize": False, "int8_mask": True},
    },
    "ties_negative": {
        "merge_method": "ties", "base_model": "BASE",
        "models": models(("A", {"weight": 0.7}), ("B", {"weight": -0.5}), ("C", {"weight": 0.1})),
        "parameters": {"density": 0.5},
    },
    "ties_rescale": {
        "merge_method": "ties", "base_model": "BASE", "models": _DENSE,
        "parameters": {"rescale": True},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs", "base_model": "BASE", "models": _DENSE,
        "parameters": {"gamma": 0.2},
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties", "base_model": "BASE", "models": _DENSE,
        "parameters": {"gamma": 0.2, "lambda": 0.9},
    },
    "slerp": {
        "merge_method": "slerp", "base_model": "A",
        "slices": slices([("A", 0, LAYERS), ("B", 0, LAYERS)]),
        "parameters": {"t": [
            {"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.5, 0]},
            {"value": 0.5},
        ]},
    },
    "slerp_base_second": {
        "merge_method": "slerp", "base_model": "B", "models": _PLAIN, "parameters": {"t": 0.3},
    },
    "slerp_slices": {
        "merge_method": "slerp", "base_model": "A", "parameters": {"t": [0.1, 0.9]},
        "slices": slices([("A", 0, 3), ("B", 1, 4)], [("A", 2, 4), ("B", 0, 2)]),
    },
    "nuslerp": {"merge_method": "nuslerp", "models": _TWO},
    "nuslerp_base": {"merge_method": "nuslerp", "base_model": "BASE", "models": _TWO},
    "nuslerp_rows": {
        "merge_method": "nuslerp", "models": _TWO, "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp_columns": {
        "merge_method": "nuslerp", "models": _TWO,
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {"merge_method": "multislerp", "models": _THREE},
    "multislerp_base": {"merge_method": "multislerp", "base_model": "BASE", "models": _THREE},
    "karcher": {"merge_method": "karcher", "models": models(("A", {}), ("B", {}), ("C", {}))},
    "karcher_base": {"merge_method": "karcher", "base_model": "BASE", "models": _PLAIN},
    "nearswap": {
        "merge_method": "nearswap", "base_model": "BASE", "models": models(("A", {})),
        "parameters": {"t": 0.05},
    },
    "model_stock": {
        "merge_method": "model_stock", "base_model": "BASE",
        "models": models(("A", {}), ("B", {}), ("C", {})),
    },
    "model_stock_rows": {
        "merge_method": "model_stock", "base_model": "BASE", "models": _PLAIN,
        "parameters": {"filter_wise": True},
    },
    "sce": {
        "merge_method": "sce", "base_model": "BASE", "models": _PLAIN,
        "parameters": {"select_topk": 0.4},
    },
    "arcee_fusion": {
        "merge_method": "arcee_fusion", "base_model": "BASE", "models": models(("A", {})),
    },
    "ram": {"merge_method": "ram", "base_model": "BASE", "models": _PLAIN,
            "parameters": {"epsilon": 0.1}},
    "ramplus_tl": {"merge_method": "ramplus_tl", "base_model": "BASE", "models": _PLAIN,
                   "parameters": {"epsilon": 0.1, "r": 0.3}},
    "passthrough": {
        "merge_method": "passthrough", "slices": slices([("A", 0, 3)], [("B", 1, 4)]),
    },
    "passthrough_scale": {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "A", "layer_range": [0, LAYERS], "parameters": {
            "scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": [1, 2]},
                      {"value": 1.0}]}}]}],
    },
}  # fmt: skip
"""Configurations without chance; the models are folders beside them."""

_DARE = models(("A", {"weight": 0.7, "density": 0.6}), ("B", {"weight": 0.5, "density": 0.3}))
RANDOM: Mapping[str, dict[str, Any]] = {
    "dare_linear": {"merge_method": "dare_linear", "base_model": "BASE", "models": _DARE},
    "dare_ties": {
        "merge_method": "dare_ties", "base_model": "BASE", "models": _DARE,
        "parameters": {"normalize": True},
    },
    "dare_linear_plain": {
        "merge_method": "dare_linear", "base_model": "BASE", "models": _DARE,
        "parameters": {"rescale": False},
    },
    "della": {"merge_method": "della", "base_model": "BASE", "models": _DARE},
    "della_linear": {
        "merge_method": "della_linear", "base_model": "BASE", "models": _DARE,
        "parameters": {"epsilon": 0.25},
    },
}  # fmt: skip
"""Configurations with chance, compared in distribution over seeds."""


def moments(merged: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what is compared of a random merge: kept fraction, L1, L2 and sum of the changes."""
    base = state("BASE")
    change = torch.cat([(merged[name].double() - base[name]).flatten() for name in sorted(base)])
    return {
        "kept": float((change != 0).double().mean()),
        "l1": float(change.abs().sum()),
        "l2": float(change.norm()),
        "sum": float(change.sum()),
    }
