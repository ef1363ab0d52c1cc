"""Layers that each task has of its own, in a merged model or in a head beside it.

The file holds `TASK/NAME` for each tensor of each task's layer, tasks counted from 1, under the
module's own names, or `TASK/head.NAME` for heads that stand outside of the module.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType]

from mergewell.descent.merge import LearnedMerge
from mergewell.descent.tasks import LearningTask
from mergewell.errors import CheckpointError, DataError
from mergewell.models.dataflow import Batch
from mergewell.models.loader import load_state, placed
from mergewell.storage.durable import write_durably
from mergewell.storage.header import build_header
from mergewell.storage.spec import TensorSpec
from mergewell.storage.weight_file import SafetensorsFile

FORMAT = "mergewell.task_layers: TASK/NAME, the layer that each task has of its own"


class Swapped(nn.Module):
    """A module that runs with other tensors in some places."""

    def __init__(self, module: nn.Module, own: Mapping[str, Tensor]) -> None:
        """Run `module` with `own` tensors, by the module's names."""
        super().__init__()
        self.whole, self.own = module, dict(own)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return functional_call(self.whole, self.own, args, kwargs)


@dataclass(frozen=True, slots=True)
class OwnLayerTask(LearningTask):
    """A task whose layer, or head, is its own and learned."""

    own: Mapping[str, nn.Parameter] = field(default_factory=dict[str, nn.Parameter])
    """Parameters of the module's layer, by the module's names, and the head's as `head.NAME`."""

    def logits(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of a batch by the task's own layer."""
        inside = {name: p for name, p in self.own.items() if not name.startswith("head.")}
        # slots make another class of this one, which super() without arguments does not know
        return LearningTask.logits(self, Swapped(module, inside) if inside else module, batch)


def with_own_layers(
    merge: LearnedMerge, tasks: Sequence[LearningTask], pattern: str
) -> list[OwnLayerTask]:
    """Return the tasks, each with its expert's layer to begin with; heads are copied.

    `pattern` matches names of tensors in the checkpoint; without one the tasks' heads are meant.

    Raises:
        DataError: no tensor matches, or a head that has no parameters, or a task of no expert.
    """
    if not pattern:
        return [_own_head(task, number) for number, task in enumerate(tasks, 1)]
    names = [name for name in merge.plan.tasks if fnmatchcase(name, pattern)]
    own_names = {id(p): name for name, p in merge.module.named_parameters()}
    found = {
        name: own_names[id(target)]
        for name, target in placed(merge.module, list(merge.plan.tasks)).items()
        if name in names and id(target) in own_names
    }
    if not found:
        raise DataError(
            f"No parameter of the model matches layer={pattern}; name the layer that each task has "
            "of its own by its tensors' names, such as 'classifier.*'."
        )
    made: list[OwnLayerTask] = []
    for number, task in enumerate(tasks, 1):
        if task.expert is None:
            raise DataError(
                f"Task {number} is of no expert, whose layer it would begin with; give inputs for "
                "each expert by itself."
            )
        expert = merge.plan.experts[task.expert]
        own = {inner: nn.Parameter(expert[name].float().clone()) for name, inner in found.items()}
        made.append(OwnLayerTask(task.expert, task.batches, task.labels, task.head, own))
    return made


def _own_head(task: LearningTask, number: int) -> OwnLayerTask:
    parameters = dict(task.head.named_parameters()) if isinstance(task.head, nn.Module) else {}
    if not parameters or not isinstance(task.head, nn.Module):
        raise DataError(
            f"Task {number} has no head with parameters outside of the model; name the layer that "
            "each task has of its own with layer=PATTERN, such as 'classifier.*'."
        )
    head = copy.deepcopy(task.head)
    own = {f"head.{name}": parameter for name, parameter in head.named_parameters()}
    return OwnLayerTask(task.expert, task.batches, task.labels, head, own)


def write_task_layers(path: Path, tasks: Sequence[OwnLayerTask]) -> None:
    """Write every task's layer to one file, replacing what is there.

    Raises:
        OutputError: it cannot be written.
    """
    parts = {
        f"{number}/{name}": parameter.detach().cpu().float().contiguous()
        for number, task in enumerate(tasks, 1)
        for name, parameter in task.own.items()
    }
    specs = [TensorSpec(name, part.dtype, tuple(part.shape)) for name, part in parts.items()]
    header, _ = build_header(specs, {"format": FORMAT})
    body = (bytes(part.reshape(-1).view(torch.uint8).numpy()) for part in parts.values())
    write_durably(path, header + b"".join(body))


def read_task_layer(path: str | Path, task: int) -> dict[str, Tensor]:
    """Return the tensors of one task's layer, tasks counted from 1, by name.

    Raises:
        CheckpointError: the file is none of this kind, or knows no such task.
    """
    file = SafetensorsFile(Path(path))
    prefix = f"{task}/"
    found = {
        name.removeprefix(prefix): file.read(name, 0, spec.numel).view(spec.shape)
        for name, spec in file.specs.items()
        if name.startswith(prefix)
    }
    if file.metadata.get("format") != FORMAT or not found:
        raise CheckpointError(
            f"{path} holds no layer of task {task}; name a file that symerge wrote and one of its "
            "tasks, from 1."
        )
    return found


def load_task_layer(module: nn.Module, path: str | Path, task: int) -> None:
    """Put one task's layer into a merged module.

    Raises:
        CheckpointError: as `read_task_layer`.
        ModelError: the layer does not fit the module.
    """
    state = dict(module.state_dict())
    inside = {n: t for n, t in read_task_layer(path, task).items() if not n.startswith("head.")}
    load_state(module, state | inside)
