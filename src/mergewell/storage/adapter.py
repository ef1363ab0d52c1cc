"""LoRA adapters, read as experts: the base plus scaling * B A, a few rows at a time.

A tensor that is touched is presented in float64, in which B A and the sum are computed, though
base and factors may be stored in 16 bits: the base plus a small change, rounded to bfloat16, would
have lost most of the change before it is merged. The result of a merge has the base's dtype.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mergewell.errors import CheckpointError
from mergewell.storage.adapter_config import ADAPTER_CONFIG, read_settings
from mergewell.storage.adapter_keys import Change, find_changes
from mergewell.storage.base import Checkpoint, Shard
from mergewell.storage.folder import is_there
from mergewell.storage.spec import TensorSpec
from mergewell.storage.weight_file import WeightFile

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WIDE = torch.float64
"""The dtype that touched tensors are computed and presented in."""

_TILE = 32_768
"""Elements of the rows that are multiplied at a time.

Tiles begin at fixed rows, whichever block is read, so that a product has the same shape and hence
the same bits however a tensor is cut into blocks.
"""


def find_adapter(path: Path) -> Path | None:
    """Return the weights of an adapter that `path`, a folder or a file, is; None if it is none.

    Raises:
        CheckpointError: an adapter without weights, or a folder that is a whole model as well.
    """
    if not is_there(path):
        return None
    if path.is_file():
        beside = (path.parent / ADAPTER_CONFIG).is_file()
        return path if path.name in ADAPTER_WEIGHTS and beside else None
    if not (path / ADAPTER_CONFIG).is_file():
        return None
    for whole in ("model.safetensors", "model.safetensors.index.json"):
        if (path / whole).is_file():
            raise CheckpointError(
                f"{path} has both {ADAPTER_CONFIG} and {whole}; give the file of weights that is "
                "meant."
            )
    for name in ADAPTER_WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} has {ADAPTER_CONFIG} but none of {', '.join(ADAPTER_WEIGHTS)}; "
        "download or save the adapter again."
    )


class AdapterCheckpoint(Checkpoint):
    """An expert read as its base plus a LoRA adapter; shapes and shards are the base's."""

    def __init__(self, adapter: Checkpoint, base: Checkpoint | None) -> None:
        """Check every tensor of the adapter's file against its configuration and `base`.

        Raises:
            CheckpointError: no base, a variant that is not supported, or tensors that do not fit.
        """
        folder = adapter.path.parent
        settings = read_settings(folder / ADAPTER_CONFIG)
        self.path = folder
        if base is None:
            trained = f" ({settings.base_name})" if settings.base_name is not None else ""
            raise CheckpointError(
                f"{folder} is a LoRA adapter; name the base that it was trained on{trained} with "
                "`base` or --base."
            )
        self._adapter, self._base = adapter, base
        self.settings = settings
        self.files = (*adapter.files, settings.path)  # its scaling stands in the configuration
        self.metadata, self.aliases = adapter.metadata, base.aliases
        self.config, self.side_files = base.config, base.side_files
        self._changes = find_changes(adapter, settings, base)
        self.specs = {**base.specs, **{name: self._spec(name) for name in self._changes}}
        new = tuple(name for name in self._changes if name not in base.specs)
        self.shards = (*base.shards, *([Shard(adapter.files[0].name, new)] if new else ()))

    @property
    def touched(self) -> tuple[str, ...]:
        """Names of the tensors that are not the base's own."""
        return tuple(self._changes)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype in the base's files, or in the adapter's if only that has it."""
        if name in self._base:
            inner = self._base
            return (
                inner.stored_dtype(name)
                if isinstance(inner, AdapterCheckpoint)
                else inner.spec(name).dtype
            )
        return self.spec(name).dtype

    def weight_files(self) -> tuple[WeightFile, ...]:
        """Return the adapter's opened file; the base has its own."""
        return self._adapter.weight_files()

    def close(self) -> None:
        """Let go of the adapter's file; the base stays open, it may have other users."""
        self._adapter.close()

    def _spec(self, name: str) -> TensorSpec:
        change = self._changes[name]
        stored = None if change.whole is None else self._adapter.specs[change.whole]
        shape = stored.shape if stored is not None else self._base.specs[name].shape
        dtype = WIDE if change.computed or stored is None else stored.dtype
        return TensorSpec(name, dtype, shape)

    def _read_block(self, spec: TensorSpec, start: int, stop: int) -> Tensor:
        change = self._changes.get(spec.name)
        if change is None:
            return self._base.read(spec.name, start, stop)
        if not change.computed:
            return self._adapter.read(cast("str", change.whole), start, stop)
        if start == stop:
            return torch.empty(0, dtype=WIDE)
        if change.added is not None:
            vector = self._adapter.read(change.added, start, stop).to(WIDE)
            return self._original(spec, change, start, stop) + change.scaling * vector
        row = spec.numel // spec.shape[0]
        tile = max(1, _TILE // row)
        begin = start // row // tile * tile
        last = -(-stop // row)
        right = self._right(change)
        tiles = [
            self._rows(spec, change, right, at, min(at + tile, spec.shape[0]))
            for at in range(begin, last, tile)
        ]
        return torch.cat(tiles).reshape(-1)[start - begin * row : stop - begin * row]

    def _rows(
        self, spec: TensorSpec, change: Change, right: Tensor, start: int, stop: int
    ) -> Tensor:
        """Return rows [start, stop) of a tensor with factors, as a matrix."""
        row = spec.numel // spec.shape[0]
        left = self._left(change, start, stop) * change.scaling
        original = self._original(spec, change, start * row, stop * row).view(-1, row)
        rows = original + left @ right
        if change.magnitude is None:
            return rows
        lengths = self._adapter.read(change.magnitude, start, stop).to(WIDE)
        # A row of zeros stays one; PEFT would divide by zero.
        norms = cast("Tensor", torch.linalg.vector_norm(rows, dim=1))
        return rows * (lengths / torch.where(norms > 0, norms, 1.0))[:, None]

    def _original(self, spec: TensorSpec, change: Change, start: int, stop: int) -> Tensor:
        if change.whole is not None:
            return self._adapter.read(change.whole, start, stop).to(WIDE)
        return self._base.read(spec.name, start, stop).to(WIDE)

    def _left(self, change: Change, start: int, stop: int) -> Tensor:
        """Return rows of the left factor, [stop - start, r]."""
        key = cast("str", change.right if change.turned else change.left)
        shape = self._adapter.specs[key].shape
        if change.turned:  # of A [r, I] the columns
            return self._adapter.read(key).view(shape[0], -1)[:, start:stop].T.to(WIDE)
        rank = prod(shape[1:])
        return self._adapter.read(key, start * rank, stop * rank).view(-1, rank).to(WIDE)

    def _right(self, change: Change) -> Tensor:
        """Return the right factor, [r, elements of a row]."""
        key = cast("str", change.left if change.turned else change.right)
        matrix = self._adapter.read(key).view(self._adapter.specs[key].shape[0], -1).to(WIDE)
        return matrix.T.contiguous() if change.turned else matrix
