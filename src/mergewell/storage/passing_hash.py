"""PassingHash: the hash of a file that is made while somebody else reads it.

A merge reads every input file more or less from front to back. Hashing what was just read costs
less than half of reading the file again, since its bytes come from the cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from mergewell.errors import CheckpointError
from mergewell.storage.base import Checkpoint
from mergewell.storage.manifest import Algorithm, InputFile, new_hasher

_WINDOW = 64 << 20
"""Bytes that may be hashed at once to catch up with a reader who left some out."""

_STEP = 4 << 20
"""Bytes that are worth stopping for: not so few that threads keep waiting for one another."""

_CHUNK = 1 << 20


class PassingHash:
    """Hashes a file as far as readers have come, and the rest of it in the end."""

    def __init__(self, path: Path, algorithm: Algorithm = "xxh3-128") -> None:
        """Start at byte 0 and note what the file looks like.

        Raises:
            CheckpointError: there is no such file.
        """
        self.path = path
        self._algorithm: Algorithm = algorithm
        self._hasher = new_hasher(algorithm)
        self._lock = Lock()
        self._before = self._look()
        self.position = 0

    def reached(self, content: memoryview, end: int) -> None:
        """Take note that readers are through with `content`, the file's bytes, up to `end`.

        Readers that jump far ahead are not followed, and none waits for another.
        """
        if not self.position + _STEP <= end <= self.position + _WINDOW:
            return
        if not self._lock.acquire(blocking=False):
            return  # somebody hashes; whoever comes next catches up
        try:
            if self.position < end:
                self._hasher.update(content[self.position : end])
                self.position = end
        finally:
            self._lock.release()

    def record(self) -> InputFile:
        """Hash what no reader came to, and return the record of the whole file.

        Raises:
            CheckpointError: the file cannot be read, or is not the one that was begun.
        """
        with self._lock:
            try:
                with self.path.open("rb", buffering=0) as file:
                    file.seek(self.position)
                    while chunk := file.read(_CHUNK):
                        self._hasher.update(chunk)
                        self.position += len(chunk)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} cannot be read ({error.strerror}); check it."
                ) from error
            if self._look() != self._before:
                raise CheckpointError(
                    f"{self.path} changed while it was merged; run again when nobody writes to it."
                )
        digest = f"{self._algorithm}:{self._hasher.hexdigest()}"
        return InputFile(path=str(self.path), hash=digest, bytes=self.position)

    def _look(self) -> tuple[int, int, int]:
        try:
            found = os.stat(self.path)  # noqa: PTH116 - beside the `os` calls of this package
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read ({error.strerror}); check it."
            ) from error
        return found.st_size, found.st_mtime_ns, found.st_ino


def hash_while_reading(
    checkpoints: Sequence[Checkpoint],
    algorithm: Algorithm = "xxh3-128",
    *,
    part: int = 0,
    parts: int = 1,
    known: Sequence[Path] = (),
) -> tuple[PassingHash, ...]:
    """Return a hash for each file of the checkpoints, fed by their reads from now on, by path.

    Of `parts` processes that share the work, this one takes the files `part`, `part + parts`, ...
    of each checkpoint; files that are `known` already are left out.

    Raises:
        CheckpointError: a file is gone.
    """
    shares = [path for checkpoint in checkpoints for path in checkpoint.files[part::parts]]
    hashes = {path: PassingHash(path, algorithm) for path in sorted({*shares}) if path not in known}
    for checkpoint in checkpoints:
        for file in checkpoint.weight_files():
            file.passing = hashes.get(file.path)
    return tuple(hashes.values())
