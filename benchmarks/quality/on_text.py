"""Texts: 8 experts of MiniLM (all-MiniLM-L6-v2), at most 48 tokens.

Seed 0 is the experts given, `DATA/experts_minilm`; other seeds are trained here the same way: the
transformer layers only, 250 steps of 16 (trec 300 of 32), AdamW 1e-4. The frozen head embeds one
phrase a class, the same for every model. The phrases behind the given experts are not written
down: of a few natural ones those stand here on which each expert's loss was smallest on 200 of its
*training* texts.
"""

from __future__ import annotations

import csv
import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from benchmark import CALIBRATION, HALF, KEEP, Benchmark, Part, cut
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergewell.demo import text
from mergewell.demo.training import fine_tune
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.views import write_task_vector

PHRASES: dict[str, str | tuple[str, ...]] = {
    "sst2": "a {} movie review",
    "trec": tuple(
        f"question about {word}"
        for word in (
            "an abbreviation", "a description", "an entity", "a person", "a location", "a number",
        )
    ),
    "agnews": tuple(
        f"news about {word}"
        for word in ("world politics", "sports", "business", "science and technology")
    ),
    "banking77": "{}",
    "tweet_emotion": "a tweet expressing {}",
    "subj": ("a subjective opinion about a movie", "an objective description of a movie plot"),
    "snips": "a text about {}",
    "sms_spam": ("a personal message", "a spam message"),
}  # fmt: skip
"""Classes in words, by task; {} is the name of the class."""
TASKS = tuple(PHRASES)
STEPS, BATCH = {"trec": 300}, {"trec": 32}


def benchmark(data: Path, cache_folder: Path, seed: int) -> Benchmark:
    """Return the benchmark of one seed; its experts must be there (see `train`)."""
    parts: tuple[dict[str, Part], ...] = ({}, {}, {})
    heads = {task: head(data, task) for task in TASKS}
    for task in TASKS:
        tests, trains = rows(data, task, "test"), rows(data, task, "train")
        inputs = np.random.default_rng(100 + seed).permutation(len(trains))[:CALIBRATION]
        cuts = cut(len(tests), seed)
        for part, source, picked in zip(
            parts, (tests, tests, trains), (*cuts, inputs), strict=True
        ):
            some = [source[i] for i in picked]
            halves = (some[:HALF], some[HALF:]) if part is parts[2] else (some,)
            found = [examples(half) for half in halves]
            part[task] = Part(
                [batch for half in found for batch in half.batches],
                [labels for half in found for labels in half.labels],
            )
    return Benchmark(
        name="text", title="MiniLM, 8 text tasks", metric="accuracy", seed=seed,
        base=text.base_checkpoint_path(),
        experts={task: expert_path(data, cache_folder, task, seed) for task in TASKS},
        factory=text.encoder,
        logits=lambda task, output: text.logits(output, heads[task]),
        validation=parts[0], test=parts[1], inputs=parts[2],
        rules=tuple({"match": match, "method": KEEP} for match in ("embeddings.*", "pooler.*")),
        precision="autocast",
    )  # fmt: skip


def expert_path(data: Path, cache_folder: Path, task: str, seed: int) -> Path:
    """Return where an expert is or will be."""
    if seed == 0:
        return data / "experts_minilm" / f"{task}.delta8.safetensors"
    return cache_folder / "text" / f"{task}.{seed}.safetensors"


def train(data: Path, path: Path, task: str, seed: int) -> None:
    """Train one expert and write its task vector."""
    module = text.encoder().requires_grad_(False)
    layers = module.transformer_layers().requires_grad_(True)
    known = rows(data, task, "train")
    ids = text.token_ids([row[0] for row in known])
    labels = torch.tensor([row[1] for row in known])
    names = head(data, task).clone()
    steps, size = STEPS.get(task, 250), BATCH.get(task, 16)
    generator = np.random.default_rng(1000 + seed)
    epochs = -(-steps * size // len(ids))
    order = np.concatenate([generator.permutation(len(ids)) for _ in range(epochs)])

    def loss(module: nn.Module, step: int) -> Tensor:
        picked = order[step * size : (step + 1) * size]
        # of such short texts the backward pass of the fused attention is 40 % of a step
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            features = module(**text.padded([ids[i] for i in picked]))
        return functional.cross_entropy(text.logits(features.float(), names), labels[picked])

    fine_tune(
        module, loss, parameters=layers.parameters(), steps=steps, learning_rate=1e-4,
        warmup_steps=steps // 10, clip=1.0, seed=seed,
    )  # fmt: skip
    trained = {n: t for n, t in module.state_dict().items() if n.startswith("encoder.layer.")}
    with open_checkpoint(text.base_checkpoint_path()) as checkpoint:
        write_task_vector(path, checkpoint, trained, {"task": task, "seed": str(seed)})


@cache
def rows(data: Path, task: str, split: str) -> list[tuple[str, int]]:
    """Return texts and labels of one split."""
    with gzip.open(data / "text" / f"{task}.{split}.csv.gz", "rt", encoding="utf-8") as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file)]


def examples(known: list[tuple[str, int]]) -> Part:
    """Return texts as batches, from the shortest to the longest."""
    ids = text.token_ids([row[0] for row in known])
    order = text.by_length(ids)
    cuts = [order[start : start + text.BATCH] for start in range(0, len(order), text.BATCH)]
    return Part(
        [text.padded([ids[i] for i in places]) for places in cuts],
        [torch.tensor([known[i][1] for i in places]) for places in cuts],
    )


@cache
def head(data: Path, task: str) -> Tensor:
    """Return the embedded phrases of a task's classes, [C, 384], made by the base."""
    phrases = PHRASES[task]
    if isinstance(phrases, str):
        meta = json.loads((data / "text" / "meta.json").read_text(encoding="utf-8"))
        phrases = tuple(phrases.format(text._words(label)) for label in meta[task]["labels"])
    return text.embed(text.encoder(), phrases).clone()
