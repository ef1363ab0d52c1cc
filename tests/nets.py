"""Small real architectures, made with random weights; nothing is downloaded."""

import copy

import pytest
import torch
from torch import nn

TOKENS = {
    "input_ids": torch.arange(14).view(2, 7) * 5 % 90,
    "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
}
PIXELS = {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def made(name: str, **more: object) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a transformers model of a kind and a batch for it."""
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "llama":
        config = library.LlamaConfig(vocab_size=99, num_key_value_heads=2, **SMALL, **more)
        return library.LlamaForCausalLM(config).eval(), TOKENS
    if name == "phi3":
        config = library.Phi3Config(
            vocab_size=99, num_key_value_heads=2, pad_token_id=0, **SMALL, **more
        )
        return library.Phi3ForCausalLM(config).eval(), TOKENS
    if name == "gpt2":
        config = library.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)
        return library.GPT2LMHeadModel(config).eval(), TOKENS
    if name == "bert":
        config = library.BertConfig(vocab_size=99, **SMALL)
        return library.BertModel(config, add_pooling_layer=False).eval(), TOKENS
    if name == "resnet":
        config = library.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic"
        )
        return library.ResNetForImageClassification(config).eval(), PIXELS
    config = library.ViTConfig(image_size=16, patch_size=4, num_labels=5, **SMALL, **more)
    return library.ViTForImageClassification(config).eval(), PIXELS


def moved(model: nn.Module, seed: int, size: float = 0.2) -> nn.Module:
    """Return a copy whose parameters moved by `size` times their own spread."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += size * noise * parameter.std().nan_to_num().clamp(min=0.02)
    return other


def average(models: list[nn.Module], shares: list[float] | None = None) -> nn.Module:
    """Return a copy of the first model with the mean of all parameters."""
    shares = shares or [1 / len(models)] * len(models)
    mean = copy.deepcopy(models[0])
    with torch.no_grad():
        for parameters in zip(mean.parameters(), *[m.parameters() for m in models], strict=True):
            parameters[0].copy_(
                sum(c * p.double() for c, p in zip(shares, parameters[1:], strict=True))
            )
    return mean
