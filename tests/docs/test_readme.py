"""The README's blocks run on toy models that bear its names: BASE, A, B, C and their texts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KINDS = {"console", "python", "yaml", "text"}
ELSEWHERE = ("make ",)
"""What CI runs by itself (`.ci/run`)."""


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def toys(folder: Path) -> None:
    """Write the models and texts that the README names."""
    words = [f"w{number}" for number in range(64)]
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(64), strict=True)), "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config)
        for name in ("BASE", "A", "B", "C"):
            model.save_pretrained(folder / name)
            tokenizer.save(str(folder / name / "tokenizer.json"))
            kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "w0"}
            (folder / name / "tokenizer_config.json").write_text(json.dumps(kind))
            with torch.no_grad():
                for weight in model.parameters():
                    weight += 0.01 * torch.randn_like(weight)
    (folder / "path/to").mkdir(parents=True)
    names = ("layer.weight", "layer.bias", "classifier.weight", "pooler.weight")
    for seed, name in enumerate(("base", "a", "b")):  # what the README's recipe has rules for
        numbers = torch.Generator().manual_seed(seed)
        (folder / "path/to" / name).mkdir()
        state = {each: torch.randn(4, 4, generator=numbers) for each in names}
        save_file(state, folder / "path/to" / name / "model.safetensors")
    lines = [json.dumps({"text": " ".join(words[start : start + 12])}) for start in range(1, 33)]
    for name in ("texts", "a", "b"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "src").symlink_to(ROOT / "src")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_block_is_of_a_kind_that_is_run_or_is_text(name: str) -> None:
    assert {kind for kind, _ in blocks(ROOT / name)} <= KINDS


@pytest.mark.slow
def test_the_blocks_of_the_readme_run(tmp_path: Path) -> None:
    toys(tmp_path)
    ran = 0
    for kind, body in blocks(ROOT / "README.md"):
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)  # each block starts anew
        if kind == "yaml":
            (tmp_path / "recipe.yaml").write_text(body)
        elif kind == "python":
            run([sys.executable, "-c", body], tmp_path, body)
            ran += 1
        elif kind == "console":
            commands = [line for line in commands_of(body) if not line.startswith(ELSEWHERE)]
            if commands:
                run(["bash", "-ec", "\n".join(commands)], tmp_path, body)
                ran += 1
    assert ran >= 5


def commands_of(body: str) -> list[str]:
    whole = body.replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in whole.splitlines() if line.startswith("$ ")]


def run(command: list[str], folder: Path, shown: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, text=True, capture_output=True, timeout=300, check=False,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{shown}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
