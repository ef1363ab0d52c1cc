"""GGUF: unquantised tensors come out under transformers' names and in their order of rows."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergewell.errors import CheckpointError
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import merge_tensors
from mergewell.storage.checkpoint import open_checkpoint

HEADS, SHARED, HEAD = 2, 1, 4


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return struct.pack("<II", 4, value)


TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}


def gguf(
    tensors: Mapping[str, Tensor],
    kind: str = "llama",
    *,
    quantised: str = "",
    version: int = 3,
    alignment: int = 64,
) -> bytes:
    values = {
        "general.architecture": struct.pack("<I", 8) + text(kind),
        "general.alignment": number(alignment),
        f"{kind}.attention.head_count": number(HEADS),
        f"{kind}.attention.head_count_kv": number(SHARED),
        "tokenizer.ggml.tokens": struct.pack("<IIQ", 9, 8, 2) + text("<s>") + text("é"),
        "tokenizer.ggml.scores": struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.0),
    }
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    head += b"".join(text(key) + value for key, value in values.items())
    body = b""
    for name, tensor in tensors.items():
        shape = tuple(reversed(tensor.shape))
        type_ = 12 if name == quantised else TYPES[tensor.dtype]
        body += b"\0" * (-len(body) % alignment)
        place = struct.pack("<IQ", type_, len(body))
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + place
        body += bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return head + b"\0" * (-len(head) % alignment) + body


def turned(weight: Tensor, heads: int) -> Tensor:
    """Return rows as llama.cpp stores them: of a head 0, half, 1, half + 1, ..."""
    parts = []
    for head in weight.chunk(heads):
        one, two = head.chunk(2)
        parts += [row for pair in zip(one, two, strict=True) for row in pair]
    return torch.stack(parts)


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a layer of transformers' Llama."""
    g = torch.Generator().manual_seed(0)
    width, layer = HEADS * HEAD, "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (5, width),
        f"{layer}self_attn.q_proj.weight": (width, width),
        f"{layer}self_attn.k_proj.weight": (SHARED * HEAD, width),
        f"{layer}mlp.down_proj.weight": (width, 3),
        f"{layer}input_layernorm.weight": (width,),
        "model.norm.weight": (width,),
        "lm_head.weight": (5, width),
    }
    return {n: torch.randn(shape, generator=g).to(dtype) for n, shape in shapes.items()}


OWN = {
    "token_embd": "model.embed_tokens", "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj", "output": "lm_head",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj", "output_norm": "model.norm",
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
}  # fmt: skip


def stored(state: Mapping[str, Tensor], *, turn: bool = True) -> dict[str, Tensor]:
    found = {f"{own}.weight": state[f"{name}.weight"] for own, name in OWN.items()}
    if turn:
        for name, heads in [("blk.0.attn_q.weight", HEADS), ("blk.0.attn_k.weight", SHARED)]:
            found[name] = turned(found[name], heads)
    return found


@pytest.mark.parametrize("dtype", TYPES)
def test_tensors_are_those_of_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    state = weights(dtype)
    (tmp_path / "m.gguf").write_bytes(gguf({**stored(state), "rope_freqs.weight": torch.ones(2)}))
    with open_checkpoint(tmp_path / "m.gguf") as found:
        assert {*found} == {*state}
        for name, tensor in state.items():
            assert torch.equal(found[name], tensor)
            pieces = [
                found.read(name, i, min(i + 5, tensor.numel())) for i in range(0, tensor.numel(), 5)
            ]
            assert torch.equal(torch.cat(pieces), tensor.flatten())
        assert found.metadata["general.architecture"] == "llama"


def test_other_architectures_are_not_turned(tmp_path: Path) -> None:
    state = weights()
    (tmp_path / "m.gguf").write_bytes(gguf(stored(state, turn=False), "qwen2", alignment=32))
    with open_checkpoint(tmp_path / "m.gguf") as found:
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_gguf_is_an_expert_of_a_safetensors_base(tmp_path: Path) -> None:
    from toys import save

    state = weights()
    base = save(tmp_path / "base", state, torch.float32)
    (tmp_path / "e.gguf").write_bytes(gguf(stored({n: t + 1 for n, t in state.items()})))
    data = {"base": str(base), "experts": [{"path": str(tmp_path / "e.gguf"), "coefficient": 0.5}]}
    plan = make_plan(make_recipe({**data, "method": {"name": "task_arithmetic", "scale": 1.0}}))
    for name, tensor in merge_tensors(plan):
        torch.testing.assert_close(tensor, state[name] + 0.5, rtol=0, atol=1e-6)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path, state = tmp_path / "m.gguf", stored(weights())

    def refused(content: bytes, words: str) -> None:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(path)

    refused(
        gguf(state, quantised="blk.0.ffn_down.weight"), r"blk.0.ffn_down.weight is quantised \(Q4_K"
    )
    refused(gguf(state, "gemma"), "architecture 'gemma'")
    refused(gguf({**state, "blk.0.ssm_a.weight": torch.ones(1)}), "'blk.0.ssm_a.weight' is called")
    refused(gguf(state, version=1), "version 1")
    refused(b"GGML" + gguf(state)[4:], "no GGUF file")
    refused(b"", "cannot be read")
    whole = gguf(state)
    refused(whole[:-1], "truncated")
    for end in range(5, 400, 7):
        refused(whole[:end], "damaged|truncated")
    with pytest.raises(CheckpointError, match=r"give one of its files \(m.gguf\)"):
        open_checkpoint(tmp_path)
