"""Make Llama-shaped checkpoints for timing: a base and experts near it, in bf16.

    python benchmarks/speed/generate.py --out /tmp/speed --size 0.5 --experts 4

Experts differ from the base by about 1 % of its size in every tensor, as fine-tunes do. Sizes are
in 1e9 parameters: 0.1, 0.5, 1.5.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from mergewell.storage.header import build_header
from mergewell.storage.spec import TensorSpec

SIZES = {  # hidden, intermediate, layers, vocabulary, key-value width
    "0.1": (512, 2048, 12, 49_152, 256),
    "0.5": (896, 4864, 24, 151_936, 128),
    "1.5": (1536, 8960, 28, 151_936, 256),
}


def specs_of(size: str) -> list[TensorSpec]:
    """Return the tensors of a Llama-shaped model with tied embeddings."""
    hidden, inner, layers, vocabulary, narrow = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.k_proj.weight": (narrow, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.v_proj.weight": (narrow, hidden),
        }
    shapes["model.norm.weight"] = (hidden,)
    return [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()]


def config_of(size: str) -> dict[str, object]:
    """Return the config.json that mergekit wants."""
    hidden, inner, layers, vocabulary, narrow = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "num_attention_heads": hidden // 64, "num_key_value_heads": narrow // 64,
        "head_dim": 64, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip


def write_model(folder: Path, size: str, index: int) -> None:
    """Write model `index`: 0 is the base, the others are experts."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    specs = specs_of(size)
    header, _ = build_header(specs, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for number, spec in enumerate(specs):
            for start in range(0, spec.numel, 1 << 22):
                count = min(1 << 22, spec.numel - start)
                seed = number * 100_003 + start // (1 << 22)
                tensor = 0.02 * torch.randn(count, generator=torch.Generator().manual_seed(seed))
                if index:
                    own = torch.Generator().manual_seed(seed + 7_919 * 1_000_003 * index)
                    # heavier tails than a Gaussian, as task vectors have
                    step = torch.randn(count, generator=own)
                    tensor += 0.0004 * step * torch.rand(count, generator=own)
                file.write(tensor.bfloat16().view(torch.uint8).numpy().tobytes())
    (folder / "config.json").write_text(json.dumps(config_of(size)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="0.5")
    parser.add_argument("--experts", type=int, default=4)
    arguments = parser.parse_args()
    for index in range(arguments.experts + 1):
        write_model(arguments.out / f"model{index}", arguments.size, index)
        print(arguments.out / f"model{index}", flush=True)


if __name__ == "__main__":
    main()
