"""Writing: a checkpoint with its tensors changed, as a new folder with a manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergewell.storage.checkpoint import Checkpoint
from mergewell.storage.manifest import InputFile, Manifest, hash_file, versions
from mergewell.storage.writer import CheckpointWriter, ShardLayout


def write_changed(
    checkpoint: Checkpoint,
    out: str | Path,
    change: Callable[[str, Tensor], Tensor],
    *,
    told: Mapping[str, Mapping[str, Any]],
    kind: str,
    used: Sequence[Path],
    seed: int,
    began: float,
) -> Manifest:
    """Write a checkpoint's files with each tensor changed; names, shapes and dtypes stay.

    told: what the manifest says besides; kind: said in the metadata; used: files that were read
    besides the checkpoint's; began: `time.perf_counter()` at the start.

    Raises:
        OutputError: `out` exists or cannot be written.
    """
    inputs = [
        InputFile(path=str(file.resolve()), hash=hash_file(file), bytes=file.stat().st_size)
        for file in dict.fromkeys((*checkpoint.files, *used))
    ]
    layouts = [
        ShardLayout(shard.file, tuple(checkpoint.spec(name) for name in shard.names))
        for shard in checkpoint.shards
    ]
    key = f"align-{kind}-{seed}-{'-'.join(file.hash for file in inputs)}"
    metadata = {"format": "pt", "mergewell.align": kind}
    changed = 0
    with CheckpointWriter(Path(out), layouts, metadata=metadata, key=key) as writer:
        for name in checkpoint:
            tensor = checkpoint[name]
            made = change(name, tensor)
            changed += not torch.equal(made, tensor)
            writer.write(name, 0, made.reshape(-1))
        for file in checkpoint.side_files:
            writer.add_file(file.name, checkpoint.side_file(file))
        return writer.commit(
            {
                "recipe": {},
                **told,
                "inputs": inputs,
                "tensors": len(checkpoint),
                "tensors_changed": changed,
                "seed": seed,
                "versions": versions(),
                "directory": str(Path.cwd()),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
