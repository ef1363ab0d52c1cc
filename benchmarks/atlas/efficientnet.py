"""Family B: EfficientNet-Lite0 (ImageNet), 64 x 64 pixels, BatchNorm in eval mode; one base.

The 8 experts given, and shorter runs with other settings. Heads, data and training are those of
`benchmarks/quality/on_vision.py`. Experts cannot be permuted here: BatchNorm's stored statistics
are kept the base's in every merge.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from family import KEEP, Drawing, Family, Part, Run, State, batches_of, noisy
from torch import Tensor, nn
from torch.nn import functional

from mergewell.demo import vision
from mergewell.demo.training import fine_tune
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.views import write_task_vector

sys.path.append(str(Path(__file__).parents[1] / "quality"))  # behind: its names give way to ours
import on_vision

TESTED, SHOWN, BATCH = 200, 16, 50
BASE = "imagenet"


class EfficientNetFamily(Family):
    """Experts of EfficientNet-Lite0 on 8 image tasks."""

    name = "efficientnet"
    tasks = on_vision.TASKS
    bases = (BASE,)
    rules = tuple(
        {"match": match, "method": KEEP}
        for match in ("_fc.*", "*.running_*", "*.num_batches_tracked")
    )
    autocast = True

    def factory(self) -> nn.Module:
        return vision.efficientnet_lite0()

    def base_path(self, base: str) -> Path:
        return vision.base_checkpoint_path()

    def head(self, base: str, task: str) -> Tensor:
        return on_vision.head(on_vision.base_module(), on_vision.arrays(self.data, task)).clone()

    def logits(self, output: Tensor, head: Tensor) -> Tensor:
        return vision.logits(output, head)

    def test(self, task: str) -> Part:
        return self._part(task, "test", np.random.default_rng(11), TESTED)

    def inputs(self, task: str) -> Part:
        return self._part(task, "train", np.random.default_rng(12), SHOWN)

    def _part(self, task: str, split: str, rng: np.random.Generator, count: int) -> Part:
        array = on_vision.arrays(self.data, task)
        picked = rng.permutation(len(array[f"y_{split}"]))[:count]
        x = vision.prepare(on_vision.images(array, split, picked))
        y = torch.from_numpy(array[f"y_{split}"][picked].astype(np.int64))
        last = torch.channels_last
        return Part([b.contiguous(memory_format=last) for b in x.split(BATCH)], y.split(BATCH))

    def given(self) -> Mapping[str, tuple[Run, Path]]:
        return {
            f"{BASE}.given.{task}": (
                Run(
                    family=self.name, base=BASE, task=task, number=-1, rate=5e-4, decay=1e-4,
                    steps=on_vision.STEPS.get(task, 200), batch=on_vision.BATCH,
                ),
                on_vision.expert_path(self.data, self.folder, task, 0),
            )
            for task in self.tasks
        }  # fmt: skip

    def draw(self, base: str, number: int) -> Run:
        rng = np.random.default_rng([42, number])
        optimiser = "sgd" if rng.random() < 0.35 else "adamw"
        low, high = (-4.0, -2.7) if optimiser == "adamw" else (-2.3, -1.0)
        steps = int(rng.choice([25, 50, 100], p=[0.4, 0.4, 0.2]))
        return Run(
            family=self.name, base=base, task=self.tasks[number % len(self.tasks)], number=number,
            optimiser=optimiser, rate=float(10 ** rng.uniform(low, high)),
            batch=int(rng.choice([8, 16, 32])), steps=steps,
            samples=int(rng.choice([200, 800, 0])), decay=float(rng.choice([0, 1e-4])),
            seed=int(rng.integers(1 << 30)), stops=(steps // 2, steps),
        )  # fmt: skip

    def train(self, run: Run, keep: Callable[[int, State], None]) -> None:
        rng = np.random.default_rng(run.seed)
        base = on_vision.base_module()
        array = on_vision.arrays(self.data, run.task)
        head = self.head(run.base, run.task)
        count = len(array["y_train"])
        shown = np.random.default_rng(12).permutation(count)[:SHOWN]
        rest = rng.permutation(np.setdiff1d(np.arange(count), shown))[: run.samples or None]
        y = torch.from_numpy(array["y_train"][rest].astype(np.int64))
        y = noisy(y, len(head), run.noise, rng)
        order = batches_of(len(y), run, rng)

        def loss(module: nn.Module, step: int) -> Tensor:
            x = vision.prepare(on_vision.images(array, "train", rest[order[step]]))
            with torch.autocast("cpu", torch.bfloat16):
                features = module(x.contiguous(memory_format=torch.channels_last))
            logits = self.logits(features.float(), head)
            return functional.cross_entropy(logits, y[torch.from_numpy(order[step])])

        def seen(step: int, _: float) -> None:
            if step + 1 in run.stops:
                keep(step + 1, {n: p.detach().clone() for n, p in base.named_parameters()})

        fine_tune(
            base, loss, parameters=base.parameters(), steps=run.steps, learning_rate=run.rate,
            weight_decay=run.decay, warmup_steps=run.steps // 10, clip=1.0, seed=run.seed,
            momentum=0.9 if run.optimiser == "sgd" else None, on_step=seen,
        )  # fmt: skip

    def write(self, path: Path, base: str, state: State, note: Mapping[str, str]) -> None:
        with open_checkpoint(self.base_path(base)) as checkpoint:
            held = {n: t for n, t in state.items() if n in checkpoint and t.is_floating_point()}
            write_task_vector(path, checkpoint, held, note)

    def draws(self) -> Drawing:
        return Drawing(runs=24, labelled_every=3, own_every=3)
