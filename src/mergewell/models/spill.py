"""Spill: tensors that wait for their turn, in memory up to a budget and above it in files.

A file is unlinked as soon as it is mapped, so that nothing is left of it whatever becomes of the
process, and its pages are the system's to write out and to take back: they are no anonymous memory.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mergewell.errors import OutputError

SMALLEST = 1 << 16
"""Bytes below which a tensor stays in memory whatever the budget."""


class Spill:
    """Keeps tensors; a context manager, whose folder is removed at the end."""

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        """Keep up to `budget` bytes in memory, the rest in a new folder within `folder`.

        The system's folder for temporary files is taken unless another is given; one that itself
        lies in memory (tmpfs) spares none.
        """
        self._budget = budget
        self._where = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers: Iterator[int] = count()
        self.held = 0
        """Bytes in memory of the kept tensors that are still in use."""
        self.spilled = 0
        """Bytes that were ever written to files."""

    def keep(self, tree: Any) -> Any:
        """Return nested tuples, lists and mappings with their tensors kept.

        A kept tensor has the same values and layout; it may be written to.

        Raises:
            OutputError: the folder cannot hold it.
        """
        return tree_map_only(Tensor, self._keep, tree)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def _keep(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return tensor
        if self.held + tensor.nbytes > self._budget and tensor.nbytes >= SMALLEST:
            return self._written(tensor)
        self.held += tensor.nbytes
        weakref.finalize(tensor, self._released, tensor.nbytes)
        return tensor

    def _released(self, size: int) -> None:
        self.held -= size

    def _written(self, tensor: Tensor) -> Tensor:
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="mergewell-", dir=self._where)
            path = Path(self._folder.name) / str(next(self._numbers))
            # room is taken before the mapping: a full disk would end the process (SIGBUS)
            with path.open("wb") as file:
                _reserve(file.fileno(), tensor.nbytes)
            flat = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
            path.unlink()
        except (OSError, RuntimeError) as error:
            raise OutputError(
                f"{self._where or tempfile.gettempdir()} cannot hold the activations of the walk "
                f"({error}); free space there or set TMPDIR to another folder."
            ) from error
        self.spilled += tensor.nbytes
        dense = bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
        strides = tensor.stride() if dense else torch.empty(tensor.shape, device="meta").stride()
        return flat.as_strided(tensor.shape, strides).copy_(tensor)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
