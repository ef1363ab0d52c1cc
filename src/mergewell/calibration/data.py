"""What a calibration is made from: data, how to run models on them, and how much memory to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mergewell.models.capture import Mode
from mergewell.models.dataflow import Batch
from mergewell.models.units import CHEAP, Kind
from mergewell.models.walk import AROUND
from mergewell.storage.base import Checkpoint
from mergewell.storage.manifest import Hasher, new_hasher

_ENDS = 64
"""Elements at either end of a tensor that its digest looks at."""


@dataclass(frozen=True, slots=True)
class Data:
    """Unlabelled inputs, the architecture that takes them, and what to gather."""

    factory: Callable[[], nn.Module]
    """Makes a module in eval mode, with whatever weights; called once, and copied."""

    batches: Sequence[Batch]
    """All batches; a shard takes some of them."""

    samples: int
    mode: Mode = "merged"

    kinds: tuple[Kind, ...] = CHEAP
    """The kinds of units that M-Loss is measured on."""

    merged_layers: bool = False
    """Whether the merged model's own layers are the merged side of M-Loss, not the mean."""

    gram: bool = False
    """Whether Gram matrices of the experts' linear layers are gathered: I^2 numbers a layer."""


@dataclass(frozen=True, slots=True)
class Memory:
    """How much a walk may hold; all models' weights of one piece come on top, in float32."""

    weights: int = AROUND
    """Bytes of weights, of all models together, up to which they are read once and kept."""

    activations: int = 1 << 30
    """Bytes of activations that wait in memory; more of them go to files."""

    folder: Path | None = None
    """Where those files are; the system's folder for temporary files if absent."""


def fingerprint(batches: Sequence[Batch]) -> str:
    """Return a hash of inputs: names, dtypes, shapes and values, batch by batch."""
    hasher = new_hasher("xxh3-128")
    for batch in batches:
        named = {"": batch} if isinstance(batch, Tensor) else dict(batch)
        for name in sorted(named):
            _describe(hasher, name, named[name].dtype, tuple(named[name].shape))
            _add(hasher, named[name])
    return f"xxh3-128:{hasher.hexdigest()}"


def digest(checkpoint: Checkpoint) -> str:
    """Return a hash of all tensors' names, dtypes and shapes, and of the values at their ends.

    Not of all values: a calibration must not read a model twice. Fine-tuning changes the ends as
    well as the rest; two copies of one model on two machines have one digest.
    """
    hasher = new_hasher("xxh3-128")
    for name in sorted(checkpoint.specs):
        spec = checkpoint.specs[name]
        _describe(hasher, name, spec.dtype, spec.shape)
        for start in {0, max(0, spec.numel - _ENDS)}:
            _add(hasher, checkpoint.read(name, start, min(spec.numel, start + _ENDS)))
    return f"xxh3-128:{hasher.hexdigest()}"


def _describe(hasher: Hasher, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    hasher.update(f"{name}\0{dtype}\0{list(shape)}\0".encode())


def _add(hasher: Hasher, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        hasher.update(flat.view(torch.uint8).numpy())
