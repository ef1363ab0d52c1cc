"""Toy language models of many architectures, made by transformers from configurations."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

WORDS = 50
_SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
_T5: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_GPT2: dict[str, Any] = {
    "vocab_size": WORDS,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXTURE: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SMALL)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SMALL, sliding_window=8)),
    "qwen2 tied": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SMALL, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SMALL, head_dim=4)),
    "gemma tied": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_SMALL, head_dim=4)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_SMALL, head_dim=4)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_SMALL, head_dim=4)),
    "phi3 fused": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_SMALL)),
    "neox fused": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_BERT)),
    "gpt2 conv1d": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "t5 gated": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
    "bert classes": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_BERT)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_SMALL, num_local_experts=3, num_experts_per_tok=2)
    ),
    "qwen2 mixture": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_SMALL, **_MIXTURE, shared_expert_intermediate_size=12)
    ),
    "qwen3 mixture": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_SMALL, **_MIXTURE, head_dim=4)
    ),
}
"""Architectures by name: fused and Conv1D matrices, tied embeddings, GQA, mixtures of experts."""

IDS = torch.arange(4, 28).view(4, 6)


def inputs(name: str) -> dict[str, Tensor]:
    """Return four short texts, as the architecture takes them."""
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return {**given, "decoder_input_ids": IDS[:, :5].contiguous()} if "t5" in name else given


def saved(model: Any, folder: Path) -> Path:
    """Save as transformers does, without its progress bar."""
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    return folder


def loaded(name: str, folder: Path) -> Any:
    """Load by transformers, which must find every tensor and want no other."""
    with contextlib.redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
        model, info = type(MODELS[name]()).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def family(
    name: str, folder: Path, experts: int = 2, size: float = 0.05
) -> tuple[Path, list[Path]]:
    """Write a base and experts near it; return their folders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    base = saved(model, folder / "base")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    folders: list[Path] = []
    for index in range(experts):
        generator = torch.Generator().manual_seed(index + 1)
        model.load_state_dict(state)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size * torch.randn(parameter.shape, generator=generator)
        folders.append(saved(model, folder / f"expert{index}"))
    return base, folders


def logits(name: str, model: Any) -> Tensor:
    """Return what a model answers to `inputs`."""
    with torch.no_grad():
        return model(**inputs(name)).logits
