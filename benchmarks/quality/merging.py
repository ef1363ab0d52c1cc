"""Candidates to merged weights in memory: by a method's recipe, or by what a learner makes of one.

A merge is kept until another method or other parameters are asked for: scales share it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmark import Benchmark
from spaces import Candidate
from torch import Tensor, nn

from mergewell.calibration.collect import calibrate
from mergewell.calibration.data import Data
from mergewell.calibration.file import write_calibration
from mergewell.descent.tasks import LearningTask
from mergewell.learners.base import LEARNERS, Learner, Material
from mergewell.methods.base import METHODS
from mergewell.models.dataflow import Batch, tensors
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors
from mergewell.storage.checkpoint import open_checkpoint

State = dict[str, Tensor]


class Merges:
    """The merges of one benchmark; `folder` keeps the calibrations."""

    def __init__(
        self, benchmark: Benchmark, folder: Path, metric: Callable[[nn.Module], float]
    ) -> None:
        self.of, self._folder, self._metric = benchmark, folder, metric
        with open_checkpoint(benchmark.base) as base:
            self.base = {name: base[name].float().clone() for name in base}
        self._known: dict[bool, tuple[str, State]] = {}

    def expert(self, task: str) -> State:
        """Return an expert's weights."""
        with open_checkpoint(self.of.base) as base:
            expert = open_checkpoint(self.of.experts[task], base=base)
            return {name: expert[name].float() for name in expert}

    def merged(self, method: str, candidate: Candidate, *, half: bool = False) -> State:
        """Return the merged weights: base + scale * (merge - base), in float32.

        With `half` from the first half of the unlabelled inputs only.

        Raises:
            UserError: whatever is wrong with the method here.
        """
        key = json.dumps([method, dict(candidate.parameters)], sort_keys=True)
        known = self._known.pop(half, None)  # so that not both are in memory
        if known is None or known[0] != key:
            known = None
            with TemporaryDirectory() as written:
                recipe = self.recipe(method, candidate.parameters, half=half, written=written)
                made = merge_tensors(make_plan(recipe))
                known = (key, {name: tensor.float() for name, tensor in made})
        self._known[half] = known
        if candidate.scale == 1.0:
            return known[1]
        return {
            name: torch.lerp(self.base[name], tensor, candidate.scale)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in known[1].items()
        }

    def uses_inputs(self, method: str, parameters: Mapping[str, Any]) -> bool:
        """Return whether a method or learner is made from the unlabelled inputs."""
        if method in METHODS.names():
            return bool(METHODS.build(method, parameters).needs.calibration)
        return LEARNERS.get(method).data == "unlabelled"

    def recipe(
        self, method: str, parameters: Mapping[str, Any], *, half: bool = False, written: str = ""
    ) -> Recipe:
        """Return the recipe of a method, or the one that a learner ends with.

        The recipe of a learner that writes weights is of those in the folder `written`, which is no
        parameter of the candidate's: its row is to be found again wherever they stood.
        """
        if method not in METHODS.names():
            folder = {"folder": written} if "folder" in LEARNERS.get(method).model_fields else {}
            learner = LEARNERS.build(method, {**parameters, **folder})
            material = self._material(learner, half=half)
            return learner.learn(self.recipe("average", {}), material).recipe
        data: dict[str, Any] = {
            "base": str(self.of.base),
            "experts": [{"path": str(path)} for path in self.of.experts.values()],
            "method": {"name": method, **parameters},
            "rules": list(self.of.rules),
            "seed": self.of.seed,
        }
        if families := METHODS.build(method, parameters).needs.calibration:
            data["calibration"] = str(self._calibration(families, half=half))
        return make_recipe(data)

    def _material(self, learner: Learner, *, half: bool) -> Material:
        """Return what a learner may use: the validation examples only if it needs labels."""
        parts = self.of.validation if learner.data == "labelled" else self.of.inputs
        tasks: list[LearningTask] = []
        for number, (task, part) in enumerate(parts.items()):
            stop = len(part.batches) // 2 if half else None
            batches = [as_given(batch) for batch in part.batches[:stop]]
            labels = part.labels[:stop] if learner.data == "labelled" else ()
            head = partial(self.of.logits, task)
            tasks.append(LearningTask(number, batches, labels, head))
        return Material(self.of.factory, self._metric, tasks)

    def inputs(self, *, half: bool) -> tuple[Sequence[Batch], Sequence[int]]:
        """Return the unlabelled inputs in float32, two batches or more a task, and whose each is.

        With `half` the first half of them.
        """
        batches: list[Batch] = []
        owners: list[int] = []
        for number, part in enumerate(self.of.inputs.values()):
            for batch in part.batches[: len(part.batches) // 2] if half else part.batches:
                batches.append(as_given(batch))
                owners.append(number)
        return batches, owners

    def _calibration(self, families: Sequence[str], *, half: bool) -> Path:
        """Return the calibration with these families, made on first use of the unlabelled inputs.

        Fisher information is that of the features where the head stands outside the module.
        """
        name = f"{self.of.name}.{self.of.seed}.{'-'.join(sorted(families))}{'.half' * half}"
        path = self._folder / "calibrations" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            batches, owners = self.inputs(half=half)
            likelihood = "classes" if self.of.metric == "perplexity" else "features"
            data = Data(
                self.of.factory, batches, sum(map(samples_in, batches)), owners=owners,
                gram="gram" in families, fisher=likelihood if "fisher" in families else None,
            )  # fmt: skip
            write_calibration(path, calibrate(make_plan(self.recipe("average", {})), data))
        return path


def as_given(batch: Batch) -> Batch:
    """Return a batch in float32, as modules take it outside the judge."""
    return batch.float() if isinstance(batch, Tensor) else batch


def samples_in(batch: Batch) -> int:
    """Return the number of samples in a batch."""
    return len(tensors(batch)[0])
