"""Restore: an expert as a folder of its own, from a merged folder and its companion."""

from __future__ import annotations

import time
from pathlib import Path

from mergewell.companions.base import (
    SUFFIX,
    base_of,
    companion_of,
    expert_tensors,
    open_companion,
)
from mergewell.errors import CheckpointError
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.layout import shard_layouts
from mergewell.storage.manifest import Manifest, input_file, versions
from mergewell.storage.writer import CheckpointWriter


def restore_expert(
    folder: str | Path, expert: str, out: str | Path, *, companion: str | Path | None = None
) -> Manifest:
    """Write `out`: the expert that a merged folder and its companion give back.

    The companion is the one in the folder, unless given. The manifest's `restored` says what the
    folder was made of; the expert is near the one that was merged, not the same.

    Raises:
        CheckpointError: no companion, several, one of another merge, or files that do not fit.
        RecipeError: the companion knows no such expert.
        OutputError: `out` exists or cannot be written.
    """
    began, merged = time.perf_counter(), open_checkpoint(folder)
    path = Path(companion) if companion is not None else companion_in(Path(folder))
    masks = open_companion(path)
    base, own = base_of(masks), companion_of(masks)
    files = dict.fromkeys([*merged.files, *masks.files, *base.files])
    inputs = [input_file(file.resolve(), "xxh3-128") for file in files]
    key = f"restore-{expert}-{'-'.join(file.hash for file in inputs)}"
    metadata = {"format": "pt", "mergewell.restored": expert}
    layouts = shard_layouts(merged.shards, merged.specs)
    with CheckpointWriter(Path(out), layouts, metadata=metadata, key=key) as writer:
        for name, tensor in expert_tensors(merged, path, expert, base=base):
            writer.write(name, 0, tensor.reshape(-1))
        for file in merged.side_files:
            writer.add_file(file.name, merged.side_file(file))
        return writer.commit(
            {
                "recipe": {},
                "restored": {
                    "expert": expert,
                    "of": str(Path(folder).resolve()),
                    "companion": str(path.resolve()),
                },
                "inputs": inputs,
                "tensors": len(merged),
                "tensors_changed": sum(own.holds(masks, name) for name in merged),
                "seed": 0,
                "versions": versions(),
                "directory": str(Path.cwd()),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )


def companion_in(folder: Path) -> Path:
    """Return the companion in a merged folder.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} holds {len(found) or 'no'} companions; merge with `--companion emr`, "
            "tall_masks, smile or mass, or name the file with --companion."
        )
    return found[0]
