"""Small LoRA adapters, written as PEFT does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["m"], "bias": "none"}


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    """Write an adapter; names go without PEFT's prefix, alpha is 2 and r 1 unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {f"base_model.model.{n}": t.clone().contiguous() for n, t in tensors.items()}
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder
