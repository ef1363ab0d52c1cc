"""ShardWriter: one safetensors file, written at planned places from any thread in any order."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mergewell.errors import MergewellError
from mergewell.storage.durable import pwrite_all, sync_folder, writing
from mergewell.storage.header import build_header
from mergewell.storage.manifest import Algorithm, OutputFile
from mergewell.storage.ordered_hash import OrderedHash
from mergewell.storage.spec import TensorSpec
from mergewell.storage.staging import DoneRecord, Staging, take_lock


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """What one file will hold, in this order."""

    file: str
    specs: tuple[TensorSpec, ...]


class ShardWriter:
    """Writes one file of an output; any process may, if each takes another file.

    A process that works without a `CheckpointWriter` shares `Staging.lock` and calls
    `Staging.join` first.
    """

    def __init__(
        self,
        staging: Staging,
        layout: ShardLayout,
        *,
        metadata: Mapping[str, str],
        key: str,
        algorithm: Algorithm = "xxh3-128",
        patience_s: float = 0.0,
    ) -> None:
        """Begin the file anew: reserve its space and write its header.

        A file that another process is writing is waited for `patience_s` seconds.

        Raises:
            OutputError: another process is writing this file, or the system refuses.
        """
        self._staging, self._layout, self._key = staging, layout, key
        self.path = staging.files / layout.file
        content, self._header = build_header(layout.specs, metadata)
        with writing(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            take_lock(self._descriptor, self.path, patience_s=patience_s)
            try:
                # First the record, or a crash from here on would leave one for a file of holes.
                staging.forget(layout.file)
                sync_folder(staging.done)
                os.ftruncate(self._descriptor, 0)
                _reserve(self._descriptor, self._header.size)
                self._hash = OrderedHash(algorithm, self._read_back)
                self._put(0, memoryview(content))
            except BaseException:
                self.close()
                raise

    def write(self, name: str, start: int, tensor: Tensor) -> None:
        """Write elements from `start` on of a tensor; every element must come exactly once.

        Raises:
            MergewellError: a block of another dtype, outside its tensor, or written before.
            OutputError: the system refuses.
        """
        spec = self._header.specs[name]
        if tensor.dtype != spec.dtype or not 0 <= start <= spec.numel - tensor.numel():
            raise MergewellError(
                f"{name}: {tensor.numel()} elements of {tensor.dtype} from {start} do not fit "
                f"into {spec.numel} of {spec.dtype}."
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            raw = flat.view(torch.uint8).numpy().data
            with writing(self.path):
                self._put(self._header.offsets[name] + start * spec.dtype.itemsize, raw)

    def finish(self, notes: Mapping[str, Any] = MappingProxyType({})) -> DoneRecord:
        """Make the file and then its done record, with `notes`, durable; return the record.

        Raises:
            MergewellError: some elements were not written, or the file was closed.
            OutputError: the system refuses; the shard must then be begun anew.
        """
        if self._descriptor < 0:
            raise MergewellError(f"{self.path} was closed; begin it anew.")
        position = self._hash.position
        if position != self._header.size:
            raise MergewellError(f"{self.path}: tensor {self._tensor_at(position)} is incomplete.")
        output = OutputFile(file=self._layout.file, hash=self._hash.value(), bytes=position)
        try:
            with writing(self.path):
                # Bytes, then the file's name, then the record: never a record without its file.
                os.fsync(self._descriptor)
                sync_folder(self._staging.files)
            self._staging.record(output, self._key, notes)
        finally:
            # Also after a failure: Linux drops the pages that it could not write, so that a
            # second fsync would succeed and lie.
            self.close()
        return DoneRecord(output, dict(notes))

    def close(self) -> None:
        """Let go of the file; without `finish` it has to be written anew."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _put(self, offset: int, content: memoryview) -> None:
        pwrite_all(self._descriptor, content, offset)
        self._hash.add(offset, content)

    def _read_back(self, count: int, offset: int) -> bytes:
        return os.pread(self._descriptor, count, offset)

    def _tensor_at(self, position: int) -> str:
        held = (spec.name for spec in self._layout.specs if spec.numel)
        return repr([name for name in held if self._header.offsets[name] <= position][-1])


def _reserve(descriptor: int, size: int) -> None:
    """Reserve the file's space, so that a full disk shows now and not in the last block."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)
