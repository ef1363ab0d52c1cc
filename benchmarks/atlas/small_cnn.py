"""Family A: a small residual CNN without BatchNorm, 16 x 16 colour; pretrained here, three bases.

A base learns a random half of the classes of every set (a linear head a set, thrown away); bases
differ in the classes, the seed and the steps. Tasks are the whole sets, gtsrb cut in two, and
three sets with their images turned by 90 degrees, which teach the opposite of what others need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from family import Drawing, Family, Part, Run, State, batches_of, noisy, read_state
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mergewell.demo import vision
from mergewell.demo.training import fine_tune

SETS = (
    "mnist", "fashion_mnist", "usps", "notmnist", "kannada", "cifar10", "sign_digits", "gtsrb",
)  # fmt: skip
TURNED = ("mnist", "fashion_mnist", "kannada")
HALVES = {"gtsrb_low": (0, 21), "gtsrb_high": (21, 43)}
TESTED, SHOWN, SHOTS, SCALE = 300, 16, 30, 20.0
STEPS = {"b0": 1500, "b1": 1500, "b2": 600}


class Block(nn.Module):
    """A convolution and ReLU, with a residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        made = functional.relu(self.conv(x))
        return x + made if self.residual else made


class SmallCnn(nn.Module):
    """Images [N, 3, 16, 16] to features [N, 128]; 138,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        plan = ((32, 48, 1), (48, 48, 1), (48, 64, 2), (64, 64, 1), (64, 128, 1))
        self.blocks = nn.ModuleList(Block(*one) for one in plan)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


class SmallCnnFamily(Family):
    """Experts of `SmallCnn` on 12 tasks."""

    name = "small_cnn"
    tasks = (
        *SETS[:-1], *HALVES, *(f"{name}_turned" for name in TURNED),
    )  # fmt: skip
    bases = tuple(STEPS)

    def __init__(self, data: Path, cache_folder: Path) -> None:
        super().__init__(data, cache_folder)
        self._split, self._whole = cache(self._split), cache(self._whole)

    def factory(self) -> nn.Module:
        return SmallCnn().eval()

    def base_path(self, base: str) -> Path:
        return self.folder / f"{base}.safetensors"

    def prepare(self) -> None:
        for base in self.bases:
            if not self.base_path(base).exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file(self._pretrained(base), self.base_path(base))

    def _pretrained(self, base: str) -> State:
        seed = 7000 + int(base[1:])
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        trunk = self.factory()
        images, labels = {}, {}
        for name in SETS:
            x, y = self._whole(name)["train"]
            classes = int(y.max()) + 1
            kept = torch.from_numpy(rng.permutation(classes)[: classes // 2])
            new = torch.full((classes,), -1)
            new[kept] = torch.arange(len(kept))
            images[name], labels[name] = x[new[y] >= 0], new[y][new[y] >= 0]
        heads = nn.ModuleDict({n: nn.Linear(128, int(labels[n].max()) + 1) for n in SETS})
        both = nn.ModuleDict({"trunk": trunk, "heads": heads})

        def loss(_: nn.Module, step: int) -> Tensor:
            name = SETS[step % len(SETS)]
            picked = rng.integers(0, len(labels[name]), 64)
            features = trunk(images[name][picked])
            return functional.cross_entropy(heads[name](features), labels[name][picked])

        fine_tune(
            both, loss, parameters=both.parameters(), steps=STEPS[base], learning_rate=2e-3,
            weight_decay=1e-4, warmup_steps=50, clip=1.0, seed=seed,
        )  # fmt: skip
        return {name: tensor.contiguous() for name, tensor in trunk.state_dict().items()}

    def head(self, base: str, task: str) -> Tensor:
        module = self.factory()
        module.load_state_dict(read_state(self.base_path(base)))
        x, y = self._split(task, "train")
        with torch.no_grad():
            return torch.stack([module(x[y == c][:SHOTS]).mean(0) for c in range(int(y.max()) + 1)])

    def logits(self, output: Tensor, head: Tensor) -> Tensor:
        one, two = functional.normalize(output, dim=-1), functional.normalize(head, dim=-1)
        return SCALE * one @ two.T

    def test(self, task: str) -> Part:
        x, y = self._split(task, "test")
        picked = np.random.default_rng(11).permutation(len(y))[:TESTED]
        return Part([x[picked]], [y[picked]])

    def inputs(self, task: str) -> Part:
        x, y = self._split(task, "train")
        picked = np.random.default_rng(12).permutation(len(y))[:SHOWN]
        return Part([x[picked]], [y[picked]])

    def draw(self, base: str, number: int) -> Run:
        rng = np.random.default_rng([41, int(base[1:]), number])
        optimiser = "sgd" if rng.random() < 0.4 else "adamw"
        low, high = (-3.5, -2.0) if optimiser == "adamw" else (-2.5, -0.7)
        steps = int(rng.choice([30, 60, 120, 240, 500], p=[0.2, 0.25, 0.25, 0.2, 0.1]))
        return Run(
            family=self.name, base=base, task=self.tasks[number % len(self.tasks)], number=number,
            optimiser=optimiser, rate=float(10 ** rng.uniform(low, high)),
            batch=int(rng.choice([8, 32, 96], p=[0.35, 0.45, 0.2])), steps=steps,
            samples=int(rng.choice([100, 400, 1500, 0])), decay=float(rng.choice([0, 1e-4, 1e-2])),
            noise=0.6 if rng.random() < 0.06 else 0.0, seed=int(rng.integers(1 << 30)),
            stops=(max(10, steps // 4), steps),
        )  # fmt: skip

    def train(self, run: Run, keep: Callable[[int, State], None]) -> None:
        rng = np.random.default_rng(run.seed)
        module = self.factory()
        module.load_state_dict(read_state(self.base_path(run.base)))
        head = self.head(run.base, run.task)
        x, y = self._split(run.task, "train")
        shown = np.random.default_rng(12).permutation(len(y))[:SHOWN]
        rest = rng.permutation(np.setdiff1d(np.arange(len(y)), shown))[: run.samples or None]
        x, y = x[rest], noisy(y[rest], len(head), run.noise, rng)
        order = batches_of(len(y), run, rng)

        def loss(module: nn.Module, step: int) -> Tensor:
            picked = torch.from_numpy(order[step])
            return functional.cross_entropy(self.logits(module(x[picked]), head), y[picked])

        def seen(step: int, _: float) -> None:
            if step + 1 in run.stops:
                keep(step + 1, {n: t.clone() for n, t in module.state_dict().items()})

        fine_tune(
            module, loss, parameters=module.parameters(), steps=run.steps, learning_rate=run.rate,
            weight_decay=run.decay, warmup_steps=run.steps // 10, clip=1.0, seed=run.seed,
            momentum=0.9 if run.optimiser == "sgd" else None, on_step=seen,
        )  # fmt: skip

    def write(self, path: Path, base: str, state: State, note: Mapping[str, str]) -> None:
        save_file({n: t.contiguous() for n, t in state.items()}, path, dict(note))

    def hidden(self, state: State) -> list[list[tuple[str, int]]]:
        def made(name: str) -> list[tuple[str, int]]:
            return [(f"{name}.weight", 0), (f"{name}.bias", 0)]

        first, second, third, fourth, fifth = (f"blocks.{i}.conv" for i in range(5))
        return [  # a residual block counts the same units before and behind it
            [*made("stem"), (f"{first}.weight", 1)],
            [*made(first), (f"{second}.weight", 1), *made(second), (f"{third}.weight", 1)],
            [*made(third), (f"{fourth}.weight", 1), *made(fourth), (f"{fifth}.weight", 1)],
        ]

    def draws(self) -> Drawing:
        return Drawing(runs=48, first=12, labelled_every=2, own_every=2)

    def _split(self, task: str, split: str) -> tuple[Tensor, Tensor]:
        """Return images [N, 3, 16, 16] and labels [N] of a task."""
        if task in HALVES:
            low, high = HALVES[task]
            x, y = self._whole("gtsrb")[split]
            held = (y >= low) & (y < high)
            return x[held], y[held] - low
        name = task.removesuffix("_turned")
        x, y = self._whole(name)[split]
        return (x.rot90(1, (2, 3)).contiguous(), y) if name != task else (x, y)

    def _whole(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Return images and labels of both splits of a set."""
        path = self.data / "vision_data" / f"{name}.npz"
        kept = self.folder / f"{name}.16.npz"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with np.load(path) as archive:
                np.savez(kept, **_small({key: archive[key] for key in archive.files}))
        with np.load(kept) as archive:
            held = {key: torch.from_numpy(archive[key]) for key in archive.files}
        return {
            split: ((held[f"x_{split}"].float() - 127) / 128, held[f"y_{split}"])
            for split in ("train", "test")
        }


def _small(array: dict[str, Any]) -> dict[str, Any]:
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
