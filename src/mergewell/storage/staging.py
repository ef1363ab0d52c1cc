"""Staging: the hidden folder beside an output in which it grows.

`.NAME.mergewell/` lies in the output's own parent, hence on the same file system, where a rename
is atomic. It holds `files/` (what will become the output), `done/` (a record for every finished
shard), `inputs/` (hashes that shard jobs made of what they read), `key` (whose run this is) and
`lock`: who writes the whole output holds it alone, shard jobs share it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mergewell.errors import CheckpointError, OutputError
from mergewell.storage.durable import write_durably, writing
from mergewell.storage.header import read_header
from mergewell.storage.manifest import InputFile, OutputFile
from mergewell.storage.strict_json import read_object


@dataclass(frozen=True, slots=True)
class DoneRecord:
    """That a shard is finished, and what its writer noted about it."""

    output: OutputFile
    notes: Mapping[str, Any]
    """Plain data, ready for JSON."""


@dataclass(frozen=True, slots=True)
class Staging:
    """The places in the hidden folder that belongs to the output `directory`."""

    directory: Path
    """The final name, absolute."""

    @property
    def root(self) -> Path:
        """The hidden folder."""
        return self.directory.with_name(f".{self.directory.name}.mergewell")

    @property
    def files(self) -> Path:
        """The folder that will be renamed to the output."""
        return self.root / "files"

    @property
    def done(self) -> Path:
        """The folder of done records."""
        return self.root / "done"

    @property
    def inputs(self) -> Path:
        """The folder of hashes of input files."""
        return self.root / "inputs"

    def join(self, key: str) -> None:
        """Make the folders, or take part in the run that made them, if it has the same `key`.

        Raises:
            OutputError: another recipe's run is unfinished here, or the system refuses.
        """
        with writing(self.root):
            self.files.mkdir(parents=True, exist_ok=True)
            self.done.mkdir(exist_ok=True)
            self.inputs.mkdir(exist_ok=True)
            found = self._key()
        if found is None:
            write_durably(self.root / "key", key.encode())
        elif found != key:
            raise OutputError(
                f"{self.root} holds an unfinished run of another recipe; "
                "remove it, choose another output, or start without resuming."
            )

    def clear(self) -> None:
        """Remove all but the lock.

        Raises:
            OutputError: the system refuses.
        """
        with writing(self.root):
            # The key goes first: folders without one are nobody's run.
            (self.root / "key").unlink(missing_ok=True)
            for folder in (self.done, self.inputs, self.files):
                if folder.exists():
                    shutil.rmtree(folder)

    def has_run(self) -> bool:
        """Return True if a run left its key here."""
        return self._key() is not None

    def finished_tensors(self) -> int:
        """Return how many tensors an unfinished run has finished; none while a process writes."""
        if not self.has_run() or self.is_locked():
            return 0
        count = 0
        for record in self.done.glob("*.json"):
            try:
                count += len(read_header(self.files / record.stem).specs)
            except CheckpointError:
                continue  # a record whose file is gone: nothing of it could be kept
        return count

    def lock(self, *, shared: bool = False) -> int:
        """Return a descriptor that keeps every other writer of this output out until closed.

        A shared lock keeps out only those that want it alone.

        Raises:
            OutputError: another process is writing this output, or the system refuses.
        """
        path = self.root / "lock"
        with writing(path):
            while True:
                self.root.mkdir(parents=True, exist_ok=True)
                try:
                    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                except FileNotFoundError:
                    continue  # the one before us removed the folder just now
                take_lock(descriptor, self.directory, shared=shared)
                if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
                os.close(descriptor)  # a lock on a file that was removed meanwhile locks nothing

    def is_locked(self) -> bool:
        """Return True if a process is writing this output, be it the whole or a shard."""
        try:
            descriptor = os.open(self.root / "lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def record(self, output: OutputFile, key: str, notes: Mapping[str, Any]) -> None:
        """Note durably that a shard is finished; its bytes must be on the disk already.

        Raises:
            OutputError: the system refuses.
        """
        line = output.model_copy(update={"key": key, "notes": dict(notes)}).model_dump_json()
        write_durably(self._record_path(output.file), line.encode())

    def record_inputs(self, part: str, files: Iterable[InputFile], key: str) -> None:
        """Note durably the hashes that one shard job made; `part` names the job.

        Raises:
            OutputError: the system refuses.
        """
        content = {"key": key, "files": [file.model_dump() for file in files]}
        write_durably(self.inputs / f"{part}.json", json.dumps(content).encode())

    def recorded_inputs(self, key: str) -> tuple[InputFile, ...]:
        """Return the hashes of input files that shard jobs of this run noted."""
        found: list[InputFile] = []
        for path in sorted(self.inputs.glob("*.json")):
            try:
                content = read_object(path, remedy="run again")
                if content.get("key") == key:
                    files = cast("list[object]", content["files"])
                    found += [InputFile.model_validate(file) for file in files]
            except (CheckpointError, LookupError, ValueError):
                continue  # half a note of a killed job: the files are hashed again
        return tuple(found)

    def forget(self, file: str) -> None:
        """Take a shard's done record back, before its file is touched."""
        self._record_path(file).unlink(missing_ok=True)

    def recorded(self, file: str, key: str, size: int) -> DoneRecord | None:
        """Return a shard's done record if it fits this run and the file; None means do it again."""
        try:
            found = read_object(self._record_path(file), remedy="run again")
            output = OutputFile(file=file, hash=found["hash"], bytes=found["bytes"])
            record = DoneRecord(output, cast("dict[str, Any]", found.get("notes") or {}))
            length = (self.files / file).stat().st_size
        except (CheckpointError, OSError, LookupError, ValueError):
            return None
        fits = found.get("key") == key and length == output.bytes == size
        return record if fits else None

    def _record_path(self, file: str) -> Path:
        return self.done / f"{file}.json"

    def _key(self) -> str | None:
        try:
            return (self.root / "key").read_text()
        except FileNotFoundError:
            return None


def take_lock(
    descriptor: int, path: Path, *, shared: bool = False, patience_s: float = 0.0
) -> None:
    """Lock an open file, or close it and say that another process is writing `path`.

    Raises:
        OutputError: another process still holds the lock after `patience_s` seconds.
    """
    deadline = time.monotonic() + patience_s
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise OutputError(
                    f"{path} is being written by another process; wait for it or choose another "
                    "output."
                ) from error
            time.sleep(min(0.2, patience_s))
