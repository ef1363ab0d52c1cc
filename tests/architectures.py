"""Toy networks of four families, made from configurations, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.models.skeleton import Skeleton, without_weights
from mergewell.storage.spec import TensorSpec


def llama() -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=20,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def vit() -> nn.Module:
    import transformers

    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            image_size=16, patch_size=4, num_labels=5,
        )
    ).eval()  # fmt: skip


class Residual(nn.Module):
    """Two convolutions with BatchNorm, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(inner)))


class Convolutional(nn.Module):
    """A stem whose convolution and BatchNorm are called apart, three blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(*(Residual(8) for _ in range(3)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def cnn() -> nn.Module:
    return Convolutional().eval()


def tokens(samples: int) -> dict[str, Tensor]:
    """Return token ids with padding behind some of them."""
    lengths = torch.randint(3, 8, (samples, 1))
    mask = (torch.arange(7) < lengths).long()
    mask[0] = 1
    return {"input_ids": torch.randint(0, 40, (samples, 7)), "attention_mask": mask}


def images(samples: int) -> Tensor:
    return torch.randn(samples, 3, 16, 16)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "llama": (llama, tokens),
    "bert": (bert, tokens),
    "vit": (vit, images),
    "cnn": (cnn, images),
}


def randomised(module: nn.Module, seed: int, size: float) -> dict[str, Tensor]:
    """Return the module's state with noise on it: what a checkpoint of an expert holds."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # a file holds a tied weight once
            continue
        seen.add(id(tensor))
        value = tensor.detach().clone()
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value = (value + size * noise).abs() if "var" in name else value + size * noise
        state[name] = value
    return state


def skeleton(factory: Callable[[], nn.Module], state: dict[str, Tensor]) -> Skeleton:
    specs = {name: TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in state.items()}
    return Skeleton(
        without_weights(factory), specs, lambda names: ((name, state[name]) for name in names)
    )
