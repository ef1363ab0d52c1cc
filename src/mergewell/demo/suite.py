"""Suite: what a demo runs on, the same shape for images and texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mergewell.evaluate import EvaluationTask
from mergewell.models.dataflow import Batch


@dataclass(frozen=True, slots=True)
class Suite:
    """A base, its experts as files, and the inputs to judge and to measure them on."""

    name: str
    """What the report calls it."""

    base: Path
    """The base checkpoint."""

    factory: Callable[[], nn.Module]
    """Makes the module, in eval mode, that takes the checkpoint's tensors by their names."""

    experts: Mapping[str, Path]
    """A task-vector file for each expert by name, in the order of the tasks."""

    tasks: tuple[EvaluationTask, ...]
    """The tasks to evaluate on; each names its own expert."""

    calibration: tuple[Batch, ...]
    """Unlabelled batches of all tasks, free of padding, for M-Loss."""

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Parameters of the demo's methods, chosen on validation data, by method."""

    own: tuple[tuple[Batch, ...], ...] = ()
    """A few unlabelled inputs of each task, in the order of the tasks; or none."""
