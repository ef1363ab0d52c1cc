"""Family C: MiniLM (all-MiniLM-L6-v2), at most 48 tokens, the transformer layers only; one base.

The 8 experts given, and shorter runs with other settings, on three more sets too. Heads (embedded
phrases, one a class), data and training are those of `benchmarks/quality/on_text.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from family import KEEP, Differentiable, Drawing, Family, Part, Run, State, batches_of, noisy
from torch import Tensor, nn
from torch.nn import functional

from mergewell.demo import text
from mergewell.demo.training import fine_tune
from mergewell.models.barrier import first_output
from mergewell.models.dataflow import Batch
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.views import write_task_vector

sys.path.append(str(Path(__file__).parents[1] / "quality"))  # behind: its names give way to ours
import on_text

MORE = {
    "clinc150": "{}",
    "tweet_sentiment": "a {} tweet",
    "tweet_offensive": ("a friendly tweet", "an offensive tweet"),
}
on_text.PHRASES.update(MORE)
TESTED, SHOWN = 120, 16
BASE = "all-minilm-l6-v2"
TRAINED = "encoder.layer."


class MiniLmFamily(Family):
    """Experts of MiniLM on 11 text tasks."""

    name = "minilm"
    tasks = (*on_text.TASKS, *MORE)
    bases = (BASE,)
    rules = tuple({"match": match, "method": KEEP} for match in ("embeddings.*", "pooler.*"))
    autocast = True

    def factory(self) -> nn.Module:
        return text.encoder()

    def base_path(self, base: str) -> Path:
        return text.base_checkpoint_path()

    def head(self, base: str, task: str) -> Tensor:
        return on_text.head(self.data, task)

    def logits(self, output: Tensor, head: Tensor) -> Tensor:
        return text.logits(output, head)

    def test(self, task: str) -> Part:
        return self._part(task, "test", 11, TESTED)

    def inputs(self, task: str) -> Part:
        return self._part(task, "train", 12, SHOWN)

    def _part(self, task: str, split: str, seed: int, count: int) -> Part:
        known = on_text.rows(self.data, task, split)
        picked = np.random.default_rng(seed).permutation(len(known))[:count]
        return on_text.examples([known[i] for i in picked])

    def given(self) -> Mapping[str, tuple[Run, Path]]:
        return {
            f"{BASE}.given.{task}": (
                Run(
                    family=self.name, base=BASE, task=task, number=-1, rate=1e-4,
                    steps=on_text.STEPS.get(task, 250), batch=on_text.BATCH.get(task, 16),
                ),
                on_text.expert_path(self.data, self.folder, task, 0),
            )
            for task in on_text.TASKS
        }  # fmt: skip

    def draw(self, base: str, number: int) -> Run:
        rng = np.random.default_rng([44, number])
        optimiser = "sgd" if rng.random() < 0.25 else "adamw"
        low, high = (-4.5, -3.2) if optimiser == "adamw" else (-2.0, -0.7)
        steps = int(rng.choice([20, 40, 80], p=[0.4, 0.4, 0.2]))
        return Run(
            family=self.name, base=base, task=self.tasks[number % len(self.tasks)], number=number,
            optimiser=optimiser, rate=float(10 ** rng.uniform(low, high)),
            batch=int(rng.choice([8, 16])), steps=steps, samples=int(rng.choice([200, 800, 0])),
            seed=int(rng.integers(1 << 30)), stops=(steps // 2, steps),
        )  # fmt: skip

    def train(self, run: Run, keep: Callable[[int, State], None]) -> None:
        rng = np.random.default_rng(run.seed)
        module = self.factory().requires_grad_(False)
        layers = module.transformer_layers().requires_grad_(True)
        known = on_text.rows(self.data, run.task, "train")
        head = self.head(run.base, run.task).clone()
        shown = np.random.default_rng(12).permutation(len(known))[:SHOWN]
        rest = rng.permutation(np.setdiff1d(np.arange(len(known)), shown))[: run.samples or None]
        ids = text.token_ids([known[i][0] for i in rest])
        labels = noisy(torch.tensor([known[i][1] for i in rest]), len(head), run.noise, rng)
        order = batches_of(len(ids), run, rng)

        def loss(module: nn.Module, step: int) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                features = module(**text.padded([ids[i] for i in order[step]]))
            logits = self.logits(features.float(), head)
            return functional.cross_entropy(logits, labels[torch.from_numpy(order[step])])

        def seen(step: int, _: float) -> None:
            if step + 1 in run.stops:
                state = module.state_dict()
                keep(step + 1, {n: t.clone() for n, t in state.items() if n.startswith(TRAINED)})

        fine_tune(
            module, loss, parameters=layers.parameters(), steps=run.steps, learning_rate=run.rate,
            warmup_steps=run.steps // 10, clip=1.0, seed=run.seed,
            momentum=0.9 if run.optimiser == "sgd" else None, on_step=seen,
        )  # fmt: skip

    def write(self, path: Path, base: str, state: State, note: Mapping[str, str]) -> None:
        with open_checkpoint(self.base_path(base)) as checkpoint:
            held = {n: t for n, t in state.items() if n.startswith(TRAINED)}
            write_task_vector(path, checkpoint, held, note)

    def trained(self, name: str) -> bool:
        return name.startswith(TRAINED)

    def differentiable(self, module: nn.Module, batch: Batch) -> Differentiable:
        """Run a module so that gradients flow to its layers and to the embeddings of its texts."""
        held: list[Tensor] = []

        def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
            held.append(output.detach().requires_grad_(True))
            return held[0]

        handle = module.get_submodule("embeddings").register_forward_hook(hook)
        try:
            output = first_output(module, batch)
        finally:
            handle.remove()
        return Differentiable(output, held[0])

    def hidden(self, state: State) -> list[list[tuple[str, int]]]:
        layers = sorted({name.split(".")[2] for name in state if name.startswith(TRAINED)})
        return [
            [
                (f"{TRAINED}{layer}.intermediate.dense.weight", 0),
                (f"{TRAINED}{layer}.intermediate.dense.bias", 0),
                (f"{TRAINED}{layer}.output.dense.weight", 1),
            ]
            for layer in layers
        ]

    def draws(self) -> Drawing:
        return Drawing(runs=22, labelled_every=4, own_every=4)
