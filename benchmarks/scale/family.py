"""The generated family: the atlas's small CNN at three widths, a base and eight experts of each.

A base learns a random half of the classes of every set (a linear head a set, thrown away); an
expert is fine-tuned on a whole set under a frozen head of class prototypes, which are mean features
of the base. Images are 16 x 16 with three channels.

Shapes: N images, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mergewell.demo import vision
from mergewell.demo.training import fine_tune

TASKS = (
    "mnist", "fashion_mnist", "usps", "notmnist", "kannada", "cifar10", "sign_digits", "gtsrb",
)  # fmt: skip
WIDTHS = (0.5, 1.0, 2.0)
STEPS, EXPERT_STEPS = 1000, 250
SHOTS, COSINE_SCALE = 30, 20.0
TESTED, HELD = 400, 64
"""Test images a task; training images a task on which a coefficient is chosen."""

State = dict[str, Tensor]


class Block(nn.Module):
    """A convolution and ReLU, with a residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        made = functional.relu(self.conv(x))
        return x + made if self.residual else made


class ScaledCnn(nn.Module):
    """Images [N, 3, 16, 16] to features [N, F]; F is 128 times the width."""

    def __init__(self, width: float) -> None:
        super().__init__()
        one, two, three, four = (int(width * channels) for channels in (32, 48, 64, 128))
        self.features = four
        self.stem = nn.Conv2d(3, one, 3, 2, 1)
        plan = ((one, two, 1), (two, two, 1), (two, three, 2), (three, three, 1), (three, four, 1))
        self.blocks = nn.ModuleList(Block(*each) for each in plan)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


class Generated:
    """A base of one width and seed and its experts, trained when they are first asked for."""

    def __init__(self, data: Path, folder: Path, width: float, seed: int) -> None:
        """Remember where data are read from and where weights are kept."""
        self.data, self.width, self.seed = data, width, seed
        self.folder, self.sets = folder / f"{width:g}.{seed}", folder / "sets"
        self.whole, self.head = cache(self.whole), cache(self.head)

    def base(self) -> Path:
        """Return the base's file, made where it is missing."""
        path = self.folder / "base.safetensors"
        if not path.exists():
            self._save(path, self._pretrained())
        return path

    def expert(self, task: str) -> Path:
        """Return an expert's file, made where it is missing."""
        path = self.folder / f"{task}.safetensors"
        if not path.exists():
            self._save(path, self._fine_tuned(task))
        return path

    def accuracy(self, module: nn.Module, task: str, part: str) -> float:
        """Return the accuracy on a part of a task's images: `test`, or those `held` out."""
        x, y = self.images(task, part)
        with torch.no_grad():
            features = torch.cat([module(piece) for piece in x.split(100)])
        return float((self.logits(features, self.head(task)).argmax(1) == y).float().mean())

    def images(self, task: str, part: str) -> tuple[Tensor, Tensor]:
        """Return images [N, 3, 16, 16] and labels [N] of a part: `train`, `held` or `test`."""
        x, y = self.whole(task, "test" if part == "test" else "train")
        order = torch.from_numpy(np.random.default_rng(11).permutation(len(y)))
        chosen = {"test": order[:TESTED], "held": order[:HELD], "train": order[HELD:]}[part]
        return x[chosen], y[chosen]

    def head(self, task: str) -> Tensor:
        """Return class prototypes [C, F]: the base's mean features of 30 images of each."""
        module = self.module(self.base())
        x, y = self.images(task, "train")
        with torch.no_grad():
            return torch.stack([module(x[y == c][:SHOTS]).mean(0) for c in range(int(y.max()) + 1)])

    def module(self, path: Path | None = None) -> ScaledCnn:
        """Return the network, with the weights of a file if one is named."""
        module = ScaledCnn(self.width).eval()
        if path is not None:
            module.load_state_dict(load_file(path))
        return module

    def logits(self, features: Tensor, head: Tensor) -> Tensor:
        """Return logits [N, C] of features [N, F]."""
        one, two = functional.normalize(features, dim=-1), functional.normalize(head, dim=-1)
        return COSINE_SCALE * one @ two.T

    def whole(self, name: str, split: str) -> tuple[Tensor, Tensor]:
        """Return all images and labels of a split of a set."""
        kept = self.sets / f"{name}.npz"
        if not kept.exists():
            self.sets.mkdir(parents=True, exist_ok=True)
            with np.load(self.data / "vision_data" / f"{name}.npz") as archive:
                np.savez(kept, **_small({key: archive[key] for key in archive.files}))
        with np.load(kept) as archive:
            images = torch.from_numpy(archive[f"x_{split}"])
            labels = torch.from_numpy(archive[f"y_{split}"])
        return (images.float() - 127) / 128, labels

    def _pretrained(self) -> State:
        rng = np.random.default_rng([7, self.seed])
        torch.manual_seed(self.seed)
        trunk = self.module()
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name in TASKS:
            x, y = self.images(name, "train")
            classes = int(y.max()) + 1
            kept = torch.from_numpy(rng.permutation(classes)[: classes // 2])
            new = torch.full((classes,), -1)
            new[kept] = torch.arange(len(kept))
            parts[name] = x[new[y] >= 0], new[y][new[y] >= 0]
        heads = nn.ModuleDict(
            {n: nn.Linear(trunk.features, int(y.max()) + 1) for n, (_, y) in parts.items()}
        )

        def loss(_: nn.Module, step: int) -> Tensor:
            name = TASKS[step % len(TASKS)]
            x, y = parts[name]
            picked = torch.from_numpy(rng.integers(0, len(y), 64))
            return functional.cross_entropy(heads[name](trunk(x[picked])), y[picked])

        both = nn.ModuleDict({"trunk": trunk, "heads": heads})
        fine_tune(
            both, loss, parameters=both.parameters(), steps=STEPS, learning_rate=2e-3,
            weight_decay=1e-4, warmup_steps=40, seed=self.seed,
        )  # fmt: skip
        return dict(trunk.state_dict())

    def _fine_tuned(self, task: str) -> State:
        rng = np.random.default_rng([8, self.seed, TASKS.index(task)])
        module, head = self.module(self.base()), self.head(task)
        x, y = self.images(task, "train")

        def loss(module: nn.Module, _: int) -> Tensor:
            picked = torch.from_numpy(rng.integers(0, len(y), 32))
            return functional.cross_entropy(self.logits(module(x[picked]), head), y[picked])

        fine_tune(
            module, loss, parameters=module.parameters(), steps=EXPERT_STEPS, learning_rate=1e-3,
            weight_decay=1e-4, warmup_steps=8, seed=self.seed,
        )  # fmt: skip
        return dict(module.state_dict())

    def _save(self, path: Path, state: Mapping[str, Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        growing = path.with_suffix(".growing")
        save_file({n: t.contiguous() for n, t in state.items()}, growing)
        growing.rename(path)  # a run that was broken off leaves no half expert


def _small(array: Mapping[str, Any]) -> dict[str, Any]:
    """Return the images of a set as uint8 [N, 3, 16, 16]."""
    found: dict[str, Any] = {}
    for split in ("train", "test"):
        if f"x_{split}" in array:
            x = torch.from_numpy(array[f"x_{split}"]).unsqueeze(1).expand(-1, 3, -1, -1)
        else:
            ends = torch.from_numpy(array[f"off_{split}"].astype(np.int64))
            x = vision.decode(torch.from_numpy(array[f"jpeg_{split}"]), ends)
        small = functional.interpolate(x.float(), size=(16, 16), mode="bilinear", antialias=True)
        found[f"x_{split}"] = small.round().clamp(0, 255).to(torch.uint8).numpy()
        found[f"y_{split}"] = array[f"y_{split}"].astype(np.int64)
    return found
