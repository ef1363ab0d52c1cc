"""What the atlas asks of a family: bases, tasks, inputs, and how experts are trained.

Shapes: N examples, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mergewell.models.barrier import first_output
from mergewell.models.dataflow import Batch
from mergewell.models.loader import load_state
from mergewell.storage.checkpoint import open_checkpoint

State = dict[str, Tensor]
KEEP = {"name": "keep", "model": 0}


@dataclass(frozen=True)
class Part:
    """Some examples of one task, and their right answers, batch by batch."""

    batches: Sequence[Batch]
    labels: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fine-tuning: what it was made with, and after which steps a checkpoint is kept."""

    family: str
    base: str
    task: str
    number: int
    optimiser: str = "adamw"
    rate: float = 1e-3
    batch: int = 32
    steps: int = 100
    samples: int = 0
    """Training examples used, 0 for all."""
    decay: float = 0.0
    noise: float = 0.0
    """Fraction of labels that were replaced by random ones."""
    seed: int = 0
    stops: tuple[int, ...] = ()


class Family:
    """Models of one architecture from one or more bases; a family is one file."""

    name: str
    tasks: tuple[str, ...]
    bases: tuple[str, ...]
    rules: Sequence[Mapping[str, Any]] = ()
    """What no expert trained stays the base's."""
    autocast: bool = False
    """Whether models are run in bfloat16 by autocast where they are judged."""

    def __init__(self, data: Path, cache_folder: Path) -> None:
        """Remember where data are read from and where weights are kept."""
        self.data, self.folder = data, cache_folder / self.name
        self.head, self.test, self.inputs = cache(self.head), cache(self.test), cache(self.inputs)

    def factory(self) -> nn.Module:
        """Return an untrained module in eval mode."""
        raise NotImplementedError

    def base_path(self, base: str) -> Path:
        """Return the checkpoint of a base, which `prepare` makes where it is not given."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what the bases lack."""

    def head(self, base: str, task: str) -> Tensor:
        """Return the frozen head of a task, made with a base, [C, D]."""
        raise NotImplementedError

    def logits(self, output: Tensor, head: Tensor) -> Tensor:
        """Return logits [N, C] of a module's output [N, D]."""
        raise NotImplementedError

    def test(self, task: str) -> Part:
        """Return the examples that retention is measured on."""
        raise NotImplementedError

    def inputs(self, task: str) -> Part:
        """Return 16 training examples, one batch; only labelled predictors see their labels."""
        raise NotImplementedError

    def given(self) -> Mapping[str, tuple[Run, Path]]:
        """Return experts that are there without being trained here, by identifier."""
        return {}

    def draw(self, base: str, number: int) -> Run:
        """Return the settings of a fine-tuning, by its number."""
        raise NotImplementedError

    def train(self, run: Run, keep: Callable[[int, State], None]) -> None:
        """Fine-tune; `keep` is called with a step and the weights after each of the run's stops."""
        raise NotImplementedError

    def write(self, path: Path, base: str, state: State, note: Mapping[str, str]) -> None:
        """Write the weights of an expert."""
        raise NotImplementedError

    def differentiable(self, module: nn.Module, batch: Batch) -> Differentiable:
        """Run a module so that gradients flow to its weights and to its input.

        The input is the batch itself, or a text's embeddings.
        """
        assert isinstance(batch, Tensor)
        inputs = batch.clone().requires_grad_(True)
        return Differentiable(first_output(module, inputs), inputs)

    def trained(self, name: str) -> bool:
        """Return whether fine-tuning moves a parameter: gradients are taken of these."""
        return True

    @property
    def has_hidden(self) -> bool:
        """Whether hidden units can be put in another order."""
        return type(self).hidden is not Family.hidden

    def hidden(self, state: State) -> Sequence[Sequence[tuple[str, int]]]:
        """Return groups of (tensor, dimension) that count the same hidden units."""
        return ()

    def draws(self) -> Drawing:
        """Return how many runs are asked for, and which sets may be drawn."""
        return Drawing()


@dataclass(frozen=True)
class Differentiable:
    """A forward pass that gradients flow through."""

    output: Tensor
    inputs: Tensor


@dataclass(frozen=True)
class Drawing:
    """How much of everything a family has."""

    runs: int = 0
    """Fine-tunings a base, of which every fifth gives a broken expert too."""
    first: int = 0
    """Runs a base that the first set draws from, besides experts given; each set one more."""
    sizes: Sequence[int] = (2, 2, 3, 3, 4, 4, 5, 6, 7, 8)
    labelled_every: int = 1
    """Every which set gets the predictors that need labels."""
    own_every: int = 1
    """Every which merge gets M-Loss with each model on its own path."""


class Runner:
    """One module of a family that takes weights after weights."""

    def __init__(self, family: Family) -> None:
        self.of = family
        self.module = family.factory().eval()

    def put(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Load weights into the module and return it."""
        load_state(self.module, state)
        return self.module

    def outputs(self, part: Part) -> Iterator[Tensor]:
        """Yield the module's outputs batch by batch, in float32."""
        precise = torch.autocast("cpu", torch.bfloat16) if self.of.autocast else nullcontext()
        for batch in part.batches:
            with torch.inference_mode(), precise:
                output = first_output(self.module, batch)
            yield output.float()

    def features(self, part: Part) -> Tensor:
        """Return the module's outputs for all examples, [N, D]."""
        return torch.cat(list(self.outputs(part)))


def right(family: Family, features: Tensor, head: Tensor, labels: Tensor) -> float:
    """Return the fraction of right answers."""
    return float((family.logits(features, head).argmax(-1) == labels).float().mean())


def read_state(path: Path, base: Path | None = None) -> State:
    """Return all tensors of a checkpoint, or of a task vector beside its base, in float32."""
    if base is None:
        with open_checkpoint(path) as found:
            return {n: _wide(found[n]).clone() for n in found}
    with open_checkpoint(base) as below:
        found = open_checkpoint(path, base=below)
        return {name: _wide(found[name]).clone() for name in found}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def batches_of(count: int, run: Run, rng: np.random.Generator) -> np.ndarray:
    """Return which examples each step of a run takes, [steps, batch]: epoch after epoch."""
    wanted = run.steps * run.batch
    order = np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])
    return order[:wanted].reshape(run.steps, run.batch)


def noisy(labels: Tensor, classes: int, share: float, rng: np.random.Generator) -> Tensor:
    """Return labels of which a share is replaced by random ones."""
    found = labels.clone()
    hit = torch.from_numpy(rng.random(len(labels)) < share)
    found[hit] = torch.from_numpy(rng.integers(0, classes, int(hit.sum())))
    return found
