"""What a benchmark of merges is made of, and how a model is judged on it.

Shapes: N examples, C classes (of a language model: tokens of the vocabulary), L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mergewell.evaluate import kl_divergence
from mergewell.models.barrier import first_output
from mergewell.models.dataflow import Batch
from mergewell.models.ensemble import ensemble_outputs

Metric = Literal["accuracy", "perplexity"]
Precision = Literal["bfloat16", "autocast", "float32"]

VALIDATION = 200
"""Examples of each task's test set that choose and are never reported; at most a quarter of it."""

REPORTED = 400
"""Of seeds other than 0, the test examples of each task that are reported at most: what is left of
the time goes into more seeds, which differ by more."""

CALIBRATION = 16
"""Unlabelled training inputs a task."""

HALF = CALIBRATION // 2
"""A method that uses inputs is made from half of them where the others are to choose by."""

Scores = dict[str, NDArray[np.float64]]
"""By task and example: right or wrong, or the mean log-probability of a text's tokens."""


@dataclass(frozen=True)
class Part:
    """Some examples of one task; labels batch by batch."""

    batches: Sequence[Batch]
    labels: Sequence[Tensor]


@dataclass(frozen=True)
class Benchmark:
    """Experts of one base and the examples to choose and to judge merges by, for one seed."""

    name: str
    title: str
    metric: Metric
    seed: int
    base: Path
    experts: Mapping[str, Path]
    """One a task, by the task's name."""
    factory: Callable[[], nn.Module]
    logits: Callable[[str, Tensor], Tensor]
    """Task and a module's output to logits [n, C], or [n, L, C] of a language model."""
    validation: Mapping[str, Part]
    test: Mapping[str, Part]
    inputs: Mapping[str, Part]
    """`CALIBRATION` unlabelled training inputs a task, in batches of `HALF` at most; their labels
    are not looked at."""
    rules: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """What no expert trained stays the base's."""
    precision: Precision = "bfloat16"

    def __post_init__(self) -> None:
        tasks = list(self.experts)
        if any(list(part) != tasks for part in (self.validation, self.test, self.inputs)):
            raise ValueError(f"{self.name}: every part needs the tasks {tasks}, in this order")


KEEP = {"name": "keep", "model": 0}


def cut(count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of the validation and of the test examples among `count`."""
    order = np.random.default_rng(seed).permutation(count)
    stop = min(VALIDATION, count // 4)
    end = stop + REPORTED if seed else count
    return np.sort(order[:stop]), np.sort(order[stop:end])


class Judge:
    """One module that takes merge after merge, and what it is judged against."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.of = benchmark
        self.module = benchmark.factory().eval()
        if benchmark.precision == "bfloat16":
            self.module = self.module.bfloat16()
        self._routed: dict[str, list[Tensor]] = {}
        self._uniform: dict[str, list[Tensor]] = {}

    def outputs(self, task: str, part: Part) -> Iterator[Tensor]:
        """Yield the module's logits batch by batch, in float32."""
        automatic = torch.autocast("cpu", torch.bfloat16, enabled=self.of.precision == "autocast")
        for batch in part.batches:
            with torch.inference_mode(), automatic:
                output = first_output(self.module, batch)
            yield self.of.logits(task, output.float())

    def scores(self, parts: Mapping[str, Part]) -> Scores:
        """Return the scores of the module as it is."""
        return {
            task: joined(
                score(self.of.metric, logits, labels)
                for logits, labels in zip(self.outputs(task, part), part.labels, strict=True)
            )
            for task, part in parts.items()
        }

    def learn_references(self, load: Callable[[str], None]) -> None:
        """Keep the experts' outputs on the unlabelled inputs; `load` puts an expert in place."""
        gathered: dict[str, list[list[Tensor]]] = {task: [] for task in self.of.experts}
        for expert in self.of.experts:
            load(expert)
            for task, part in self.of.inputs.items():
                outputs = list(self.outputs(task, part))
                gathered[task].append(outputs)
                if task == expert:
                    self._routed[task] = [logits.log_softmax(-1) for logits in outputs]
        for task, experts in gathered.items():
            self._uniform[task] = [
                ensemble_outputs(logits, "logits").log_softmax(-1)
                for logits in zip(*experts, strict=True)
            ]

    def without_labels(self, *, held_out: bool) -> dict[str, float]:
        """Return how far the module is from the experts on the unlabelled inputs.

        kl_routed: mean over tasks of KL(the task's own expert || module) in nats; kl_uniform: of
        KL(the experts' uniform logit ensemble || module); agreement: with the own expert's answers.
        With `held_out` only on the second half, for merges made from the first.
        """
        found: dict[str, list[float]] = {"kl_routed": [], "kl_uniform": [], "agreement": []}
        for task, part in self.of.inputs.items():
            start = len(part.batches) // 2 if held_out else 0
            some = Part(part.batches[start:], part.labels[start:])
            routed, uniform, agreed = [], [], []
            for number, logits in enumerate(self.outputs(task, some), start):
                logs = logits.log_softmax(-1)
                own = self._routed[task][number]
                routed.append(kl_divergence(own, logs).flatten())
                uniform.append(kl_divergence(self._uniform[task][number], logs).flatten())
                agreed.append((own.argmax(-1) == logs.argmax(-1)).flatten().float())
            for key, values in zip(found, (routed, uniform, agreed), strict=True):
                found[key].append(float(torch.cat(values).mean()))
        return {key: float(np.mean(values)) for key, values in found.items()}


def score(metric: Metric, logits: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """Return the score of each example of a batch, [n]; higher is better."""
    if metric == "accuracy":
        return (logits.argmax(-1) == labels).double().numpy()
    logs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logs.double().mean(-1).numpy()


def joined(parts: Iterator[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the scores of all batches in one row."""
    return np.concatenate(list(parts))


def shown(metric: Metric, value: float) -> float:
    """Return a mean score as it is reported: accuracy in %, or perplexity."""
    return 100 * value if metric == "accuracy" else float(np.exp(-value))
