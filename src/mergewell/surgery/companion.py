"""The companion of a merged model that holds corrections: one file, a set of them a task.

A corrected model is not a plain checkpoint any more: `load_corrected` makes its module, for one
task, which has to be known wherever it is used. The file holds `TASK/PLACE/down` [R, C] and
`TASK/PLACE/up` [C, R] in float32, tasks and places as numbers; its metadata name them and say, by a
hash of all weights, which merged model they belong to.
Shapes: C nodes, R rank.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mergewell.distil.weights import content
from mergewell.errors import CheckpointError, RecipeError, did_you_mean
from mergewell.models.loader import load_state
from mergewell.storage.base import Checkpoint
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.durable import write_durably
from mergewell.storage.header import build_header
from mergewell.storage.manifest import new_hasher
from mergewell.storage.spec import TensorSpec
from mergewell.surgery.correction import Corrected, Correction

FORMAT = "mergewell.surgery: TASK/PLACE/down and /up of corrections; beside its merged model"
SUFFIX = ".companion.safetensors"


def write_corrections(
    folder: str | Path,
    corrections: Mapping[str, Mapping[str, Correction]],
    *,
    merged: Mapping[str, Tensor],
    made_by: str,
    parameters: Mapping[str, object],
) -> Path:
    """Write the corrections, by task and place, of a merged model and return the file's path.

    Its name tells the content: the same corrections go to the same file.

    Raises:
        OutputError: it cannot be written.
    """
    places = list(next(iter(corrections.values())))
    parts = {
        f"{row}/{column}/{key}": getattr(each[place], key).detach()
        for row, each in enumerate(corrections.values())
        for column, place in enumerate(places)
        for key in ("down", "up")
    }
    metadata = {
        "format": FORMAT,
        "companion": made_by,
        "parameters": json.dumps(parameters),
        "tasks": json.dumps(list(corrections)),
        "places": json.dumps(places),
        "merged": weights_digest(merged),
    }
    specs = [TensorSpec(name, part.dtype, tuple(part.shape)) for name, part in parts.items()]
    header, _ = build_header(specs, metadata)
    body = b"".join(content(part) for part in parts.values())
    hasher = new_hasher("xxh3-128")
    hasher.update(header + body)
    path = Path(folder).resolve() / f"{made_by}-{hasher.hexdigest()[:12]}{SUFFIX}"
    write_durably(path, header + body)
    return path


def load_corrected(
    merged: str | Path | Checkpoint,
    companion: str | Path,
    task: str,
    factory: Callable[[], nn.Module],
) -> Corrected:
    """Return a merged model's module with the corrections of one task; the task has to be known.

    `factory` makes the network, in eval mode, with whatever weights.

    Raises:
        CheckpointError: no such companion, or one of another merged model.
        RecipeError: the companion knows no such task.
        ModelError: the network is not the one that the weights are of.
    """
    weights = merged if isinstance(merged, Checkpoint) else open_checkpoint(merged)
    file = open_corrections(companion)
    if weights_digest(weights) != file.metadata.get("merged"):
        raise CheckpointError(
            f"{companion} belongs to another merged model than {weights.path}: the weights differ; "
            "name the one that it was made for."
        )
    module = factory()
    load_state(module, weights)
    return Corrected(module, _corrections(file, task)).eval()


def open_corrections(path: str | Path) -> Checkpoint:
    """Open a companion that holds corrections.

    Raises:
        CheckpointError: it is none.
    """
    file = open_checkpoint(path)
    if not file.metadata.get("format", "").startswith("mergewell.surgery"):
        raise CheckpointError(
            f"{path} holds no corrections; write some with `mergewell learn surgery`."
        )
    return file


def task_names(paths: Iterable[str]) -> tuple[str, ...]:
    """Return a name for each expert: that of its file or folder, numbered where two are alike."""
    names = [
        Path(path).name.removesuffix(".safetensors").removesuffix(".task_vector") for path in paths
    ]
    counts = Counter(names)
    return tuple(
        name if counts[name] == 1 else f"{name}#{number}" for number, name in enumerate(names, 1)
    )


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a hash of a model's tensors: names, dtypes, shapes and values; each is read once."""
    hasher = new_hasher("xxh3-128")
    for name in sorted(weights):
        tensor = weights[name]
        hasher.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        hasher.update(content(tensor))
    return f"xxh3-128:{hasher.hexdigest()}"


def _corrections(file: Checkpoint, task: str) -> dict[str, Correction]:
    tasks: Sequence[str] = json.loads(file.metadata["tasks"])
    places: Sequence[str] = json.loads(file.metadata["places"])
    if task not in tasks:
        raise RecipeError(f"{file.path} knows no task {task!r}: {did_you_mean(task, tasks)}")
    row = tasks.index(task)
    keys = [
        tuple(f"{row}/{column}/{key}" for key in ("down", "up")) for column in range(len(places))
    ]
    if lacking := [name for pair in keys for name in pair if name not in file]:
        raise CheckpointError(f"{file.path} lacks {lacking[0]!r}; write the file again.")
    return {
        place: Correction(*(file[name].to(torch.float32) for name in pair))
        for place, pair in zip(places, keys, strict=True)
    }
