"""Images: 8 experts of EfficientNet-Lite0 (ImageNet), 64 x 64 pixels.

Seed 0 is the experts given, `DATA/experts_vision`; other seeds are trained here the same way:
200 steps of 32 (mnist 250), AdamW 5e-4, weight decay 1e-4, BatchNorm in eval mode. The frozen head
is the mean base feature of the first 30 training images of each class, the same for every model.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import CALIBRATION, HALF, KEEP, Benchmark, Part, cut
from torch import Tensor, nn
from torch.nn import functional

from mergewell.demo import vision
from mergewell.demo.training import fine_tune
from mergewell.models.loader import load_state
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.views import write_task_vector

TASKS = (
    "mnist", "fashion_mnist", "usps", "notmnist", "kannada", "cifar10", "gtsrb", "sign_digits",
)  # fmt: skip
SHOTS = 30
STEPS = {"mnist": 250}
BATCH = 32


def benchmark(data: Path, cache_folder: Path, seed: int) -> Benchmark:
    """Return the benchmark of one seed; its experts must be there (see `train`)."""
    parts: tuple[dict[str, Part], ...] = ({}, {}, {})
    heads: dict[str, Tensor] = {}
    base = base_module()
    for task in TASKS:
        array = arrays(data, task)
        heads[task] = head(base, array)
        count, trained = len(array["y_test"]), len(array["y_train"])
        inputs = np.random.default_rng(100 + seed).permutation(trained)[:CALIBRATION]
        for part, split, picked in zip(
            parts, ("test", "test", "train"), (*cut(count, seed), inputs), strict=True
        ):
            x = vision.prepare(images(array, split, picked)).bfloat16()
            labels = torch.from_numpy(array[f"y_{split}"][picked].astype(np.int64))
            size = vision.BATCH if split == "test" else HALF
            part[task] = Part(
                [b.contiguous(memory_format=torch.channels_last) for b in x.split(size)],
                labels.split(size),
            )
    return Benchmark(
        name="vision", title="EfficientNet-Lite0, 8 image tasks", metric="accuracy", seed=seed,
        base=vision.base_checkpoint_path(),
        experts={task: expert_path(data, cache_folder, task, seed) for task in TASKS},
        factory=vision.efficientnet_lite0,
        logits=lambda task, output: vision.logits(output, heads[task]),
        validation=parts[0], test=parts[1], inputs=parts[2],
        rules=tuple(
            {"match": match, "method": KEEP}
            for match in ("_fc.*", "*.running_*", "*.num_batches_tracked")
        ),
    )  # fmt: skip


def expert_path(data: Path, cache_folder: Path, task: str, seed: int) -> Path:
    """Return where an expert is or will be."""
    if seed == 0:
        return data / "experts_vision" / f"{task}.delta8.safetensors"
    return cache_folder / "vision" / f"{task}.{seed}.safetensors"


def train(data: Path, path: Path, task: str, seed: int) -> None:
    """Train one expert and write its task vector."""
    # float32: the backward pass of depthwise convolutions is slower in bfloat16 on this CPU
    base = base_module().to(memory_format=torch.channels_last)
    array = arrays(data, task)
    prototypes = head(base, array).clone()
    labels = torch.from_numpy(array["y_train"].astype(np.int64))
    steps = STEPS.get(task, 200)
    generator = np.random.default_rng(1000 + seed)
    epochs = -(-steps * BATCH // len(labels))
    order = np.concatenate([generator.permutation(len(labels)) for _ in range(epochs)])

    def loss(module: nn.Module, step: int) -> Tensor:
        picked = order[step * BATCH : (step + 1) * BATCH]
        x = vision.prepare(images(array, "train", picked))
        features = module(x.contiguous(memory_format=torch.channels_last))
        logits = vision.logits(features, prototypes)
        return functional.cross_entropy(logits, labels[picked])

    fine_tune(
        base, loss, parameters=base.parameters(), steps=steps, learning_rate=5e-4,
        weight_decay=1e-4, warmup_steps=30, clip=1.0, seed=seed,
    )  # fmt: skip
    with open_checkpoint(vision.base_checkpoint_path()) as checkpoint:
        trained = {name: p.detach() for name, p in base.named_parameters()}
        write_task_vector(path, checkpoint, trained, {"task": task, "seed": str(seed)})


def base_module() -> nn.Module:
    """Return the base, in eval mode."""
    module = vision.efficientnet_lite0()
    with open_checkpoint(vision.base_checkpoint_path()) as checkpoint:
        load_state(module, {name: checkpoint[name] for name in checkpoint})
    return module


@cache
def arrays(data: Path, task: str) -> dict[str, Any]:
    """Return the arrays of one data set."""
    with np.load(data / "vision_data" / f"{task}.npz") as archive:
        return {key: archive[key] for key in archive.files}


def images(array: dict[str, Any], split: str, picked: Any) -> Tensor:
    """Return uint8 images [N, 3, H, W]."""
    if f"x_{split}" in array:
        return torch.from_numpy(array[f"x_{split}"][picked]).unsqueeze(1).expand(-1, 3, -1, -1)
    jpeg, offsets = array[f"jpeg_{split}"], array[f"off_{split}"].astype(np.int64)
    parts = [jpeg[offsets[i] : offsets[i + 1]] for i in picked]
    ends = torch.tensor([0, *np.cumsum([len(part) for part in parts])])
    return vision.decode(torch.from_numpy(np.concatenate(parts)), ends)


def head(base: nn.Module, array: dict[str, Any]) -> Tensor:
    """Return class prototypes [C, 1280]."""
    labels = array["y_train"].astype(np.int64)
    rows: list[Tensor] = []
    with torch.no_grad():
        for label in range(int(labels.max()) + 1):
            picked = np.flatnonzero(labels == label)[:SHOTS]
            rows.append(base(vision.prepare(images(array, "train", picked))).mean(0))
    return torch.stack(rows)
