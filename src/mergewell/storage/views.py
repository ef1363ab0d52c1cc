"""Task-vector files: an expert kept as what it adds to its base, in int8.

Keys: NAME.q (int8) with NAME.s (float32, one scale a row, that is per index of dimension 0), or
NAME.d (float, small tensors). Expert = base + q * s, or base + d; tensors without keys are the
base's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mergewell.errors import CheckpointError, did_you_mean
from mergewell.storage.base import Checkpoint
from mergewell.storage.durable import write_durably
from mergewell.storage.header import build_header
from mergewell.storage.spec import TensorSpec, is_mergeable
from mergewell.storage.weight_file import WeightFile

FORMAT = "mergewell.task_vector: NAME.q int8 * NAME.s per row, or NAME.d; expert = base + that"
_LEVELS = 127  # symmetric: -128 is not used, so that a task vector and its negative are alike
_KINDS = (".q", ".s", ".d")


def is_task_vector(file: Checkpoint) -> bool:
    """Return True if the file's metadata say so, or all its names are those of a task vector."""
    if file.metadata.get("format", "").startswith("mergewell.task_vector"):
        return True
    pairs = [{name[:-2] for name in file if name.endswith(kind)} for kind in (".q", ".s")]
    return len(file) > 0 and all(name.endswith(_KINDS) for name in file) and pairs[0] == pairs[1]


class TaskVectorCheckpoint(Checkpoint):
    """An expert read as its base plus a task vector; dtypes, shapes and shards are the base's."""

    def __init__(self, delta: Checkpoint, base: Checkpoint | None) -> None:
        """Check every tensor of the task vector `delta` against `base`.

        Raises:
            CheckpointError: no base, or a tensor that the base lacks or has in another shape.
        """
        if base is None:
            raise CheckpointError(
                f"{delta.path} is a task vector; name the base that it was taken from."
            )
        self._delta, self._base = delta, base
        self.path, self.files, self.metadata = delta.path, delta.files, delta.metadata
        self.specs, self.aliases, self.shards = base.specs, base.aliases, base.shards
        self.config, self.side_files = base.config, base.side_files
        self._keys: dict[str, str] = {}
        for key in delta:
            if key.endswith(".s"):
                if f"{key[:-2]}.q" not in delta:
                    raise CheckpointError(
                        f"{delta.path}: {key!r} scales nothing; write the file again."
                    )
            else:
                name = self._checked_name(key)
                if name in self._keys:
                    raise CheckpointError(
                        f"{delta.path} has both {self._keys[name]!r} and {key!r} for one tensor; "
                        "write the file again."
                    )
                self._keys[name] = key

    def weight_files(self) -> tuple[WeightFile, ...]:
        """Return the task vector's opened file; the base has its own."""
        return self._delta.weight_files()

    def close(self) -> None:
        """Let go of the task vector's file; the base stays open, it may have other users."""
        self._delta.close()

    def _read_block(self, spec: TensorSpec, start: int, stop: int) -> Tensor:
        base = self._base.read(spec.name, start, stop)
        key = self._keys.get(spec.name)
        if key is None or start == stop:
            return base
        # Element by element in float32 (the sum in float64 for a float64 base), so that blocks
        # join bit for bit wherever they are cut.
        change = self._delta.read(key, start, stop).float()
        if key.endswith(".q"):
            change = change * self._scales(key, start, stop)
        compute = torch.promote_types(spec.dtype, torch.float32)
        return (base.to(compute) + change.to(compute)).to(spec.dtype)

    def _scales(self, key: str, start: int, stop: int) -> Tensor:
        """Return the scale of every element in the block."""
        spec = self._delta.spec(key)
        row = spec.numel // spec.shape[0]
        first, last = start // row, -(-stop // row)
        counts = torch.full((last - first,), row)
        counts[0] -= start - first * row
        counts[-1] -= last * row - stop
        return self._delta.read(f"{key[:-2]}.s", first, last).repeat_interleave(counts)

    def _checked_name(self, key: str) -> str:
        path, file = self._delta.path, self._delta
        if not key.endswith(_KINDS):
            raise CheckpointError(
                f"{path}: {key!r} ends in none of {', '.join(_KINDS)}; write the file again."
            )
        name = self.aliases.get(key[:-2], key[:-2])
        spec = self.specs.get(name)
        if spec is None:
            raise CheckpointError(
                f"{path}: the base {self._base.path} has no tensor {name!r}, "
                f"{did_you_mean(name, self.specs)}"
            )
        found = file.specs[key]
        if found.shape != spec.shape:
            raise CheckpointError(
                f"{path}: {key!r} has shape {list(found.shape)} but the base's tensor "
                f"{list(spec.shape)}; name the base that the task vector was taken from."
            )
        if not is_mergeable(spec.dtype):
            raise CheckpointError(
                f"{path}: {key!r} changes a tensor of dtype {spec.dtype}; "
                "only floating ones can be changed, so write the file again."
            )
        scale = file.specs.get(f"{key[:-2]}.s")
        if key.endswith(".d"):
            sound = is_mergeable(found.dtype) and scale is None
        else:
            rows = (torch.float32, found.shape[:1]) if found.shape else None
            sound = found.dtype == torch.int8 and scale is not None
            sound = sound and scale is not None and (scale.dtype, scale.shape) == rows
        if not sound:
            raise CheckpointError(
                f"{path}: {key!r} is neither int8 with one float32 scale a row nor a plain "
                "floating tensor; write the file again."
            )
        return name


def write_task_vector(
    path: Path, base: Checkpoint, expert: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write what `expert` adds to `base` as an int8 task-vector file, 4 times smaller than float32.

    Tensors of two or more dimensions become int8 with the scale max|row| / 127; smaller ones
    float16 (float32 where float16 overflows). Tensors equal to the base's are left out. The
    file appears whole or not at all.

    Raises:
        CheckpointError: a tensor that the base lacks or has in another shape, that is not finite,
            or that differs from the base's though it is not floating.
        OutputError: the file cannot be written.
    """
    parts: dict[str, Tensor] = {}
    for name in sorted(expert):
        tensor, where = expert[name].detach().cpu(), f"{path}: tensor {name!r}"
        spec = base.spec(name)
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"{where} has shape {list(tensor.shape)} but the base's {list(spec.shape)}; "
                "give the base that the expert was trained from."
            )
        if torch.equal(tensor, base[name].to(tensor.dtype)):
            continue
        if not is_mergeable(spec.dtype):
            raise CheckpointError(
                f"{where} is not floating but differs from the base's; leave it out."
            )
        delta = tensor.float() - base[name].float()
        if not delta.isfinite().all():
            raise CheckpointError(f"{where} has a value that is not finite; train again.")
        parts |= _quantised(name, delta)
    specs = [TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in parts.items()]
    header, _ = build_header(specs, {**metadata, "format": FORMAT})
    body = (value.contiguous().reshape(-1).view(torch.uint8) for value in parts.values())
    write_durably(path, header + b"".join(bytes(part.numpy()) for part in body))


def _quantised(name: str, delta: Tensor) -> dict[str, Tensor]:
    if delta.ndim < 2:
        half = delta.half()
        return {f"{name}.d": half if half.isfinite().all() else delta}
    rows = delta.flatten(1)
    scale = rows.abs().amax(1) / _LEVELS
    # A row of zeros has scale 0; any divisor keeps it zero.
    levels = (rows / torch.where(scale > 0, scale, 1)[:, None]).round().clamp(-_LEVELS, _LEVELS)
    return {f"{name}.q": levels.to(torch.int8).view(delta.shape), f"{name}.s": scale}
