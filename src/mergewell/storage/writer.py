"""CheckpointWriter: a folder of weights that appears under its name complete, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Lock
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

from torch import Tensor

from mergewell.errors import MergewellError, OutputError
from mergewell.storage.durable import sync_folder, write_synced, writing
from mergewell.storage.header import build_header
from mergewell.storage.manifest import (
    MANIFEST,
    Algorithm,
    InputFile,
    Manifest,
    OutputFile,
    hash_file,
    new_hasher,
)
from mergewell.storage.shard_writer import ShardLayout, ShardWriter
from mergewell.storage.staging import DoneRecord, Staging

__all__ = ["CheckpointWriter", "FileWriter", "ShardLayout", "ShardWriter", "require_free_name"]

INDEX = "model.safetensors.index.json"


class FileWriter(Protocol):
    """What files are written with: a `CheckpointWriter`, or that of one shard job."""

    def write(self, name: str, start: int, tensor: Tensor) -> None:
        """Write elements from `start` on of a tensor."""

    def finish(self, file: str, notes: Mapping[str, Any]) -> object:
        """Make a file durable and note that it is done."""


class CheckpointWriter:
    """Writes shards and other files beside the output and renames them in the end.

    After a crash, an error or `kill -9` the output's name is free, and a writer with
    `resume=True` and the same `key` keeps the shards that were finished.
    """

    def __init__(
        self,
        directory: Path,
        layouts: Iterable[ShardLayout],
        *,
        metadata: Mapping[str, str],
        key: str,
        resume: bool = False,
        algorithm: Algorithm = "xxh3-128",
    ) -> None:
        """Take the output's lock and check that there is room; `key` names the recipe.

        Without `resume` the remains of an earlier run are removed.

        Raises:
            OutputError: the output exists, is being written by another process, does not fit on
                the disk, or an unfinished run of another recipe is to be resumed.
        """
        planned = tuple(layouts)
        self.directory = Path(directory).resolve()
        self._layouts = {layout.file: layout for layout in planned}
        self._homes = {s.name: file for file, it in self._layouts.items() for s in it.specs}
        if len(self._homes) != sum(len(layout.specs) for layout in planned):
            raise MergewellError(f"{self.directory}: a file or a tensor is planned twice.")
        self._metadata, self._key = metadata, key
        self._algorithm: Algorithm = algorithm
        self._staging = Staging(self.directory)
        self._opening = Lock()
        self._shards: dict[str, ShardWriter] = {}
        self._others: dict[str, OutputFile] = {}
        self._done: dict[str, DoneRecord] = {}
        sizes = {
            file: build_header(layout.specs, metadata)[1].size
            for file, layout in self._layouts.items()
        }
        require_free_name(self.directory)
        self._lock = self._staging.lock()
        kept = resume and self._staging.has_run()
        try:
            if not kept:
                self._staging.clear()
            self._staging.join(key)
            for file, size in sizes.items():
                record = self._staging.recorded(file, key, size)
                if record is not None and record.output.hash.startswith(f"{algorithm}:"):
                    self._done[file] = record
            self._require_space({f: size for f, size in sizes.items() if f not in self._done})
        except BaseException:
            self.abort(keep=kept)
            raise

    @property
    def pending(self) -> tuple[ShardLayout, ...]:
        """Shards that are not finished."""
        return tuple(layout for file, layout in self._layouts.items() if file not in self._done)

    @property
    def outputs(self) -> tuple[OutputFile, ...]:
        """Finished files: shards in the order of the layouts, then the others."""
        shards = (self._done[file].output for file in self._layouts if file in self._done)
        return (*shards, *self._others.values())

    @property
    def notes(self) -> tuple[Mapping[str, Any], ...]:
        """The notes of the finished shards, of this run or an earlier one, in their order."""
        return tuple(self._done[file].notes for file in self._layouts if file in self._done)

    @property
    def recorded_inputs(self) -> tuple[InputFile, ...]:
        """Hashes of input files that shard jobs of this run made."""
        return self._staging.recorded_inputs(self._key)

    def write(self, name: str, start: int, tensor: Tensor) -> None:
        """Write elements from `start` on of a tensor; any order, any thread, each exactly once.

        Raises:
            MergewellError: a block that does not fit, was written before, or of a finished shard.
            OutputError: the system refuses.
        """
        self._shard(self._homes[name]).write(name, start, tensor)

    def finish(self, file: str, notes: Mapping[str, Any] = MappingProxyType({})) -> OutputFile:
        """Make a shard durable and note that it is done; return its record.

        `notes`, plain data about the shard, are kept with the record and come back in `notes`.

        Raises:
            MergewellError: some elements were not written.
            OutputError: the system refuses.
        """
        if file not in self._done:
            self._done[file] = self._shard(file).finish(notes)
            self._shards.pop(file).close()
        return self._done[file].output

    def add_file(self, name: str, content: bytes) -> OutputFile:
        """Add another file, such as `config.json`.

        Raises:
            MergewellError: the name is taken or is not that of a file.
            OutputError: the system refuses.
        """
        self._require_free(name)
        with writing(self._staging.files / name):
            write_synced(self._staging.files / name, content)
        hasher = new_hasher(self._algorithm)
        hasher.update(content)
        digest = f"{self._algorithm}:{hasher.hexdigest()}"
        self._others[name] = OutputFile(file=name, hash=digest, bytes=len(content))
        return self._others[name]

    def add_written(self, name: str, write: Callable[[Path], object]) -> OutputFile:
        """Add another file that `write` makes durable at the path it is given.

        Raises:
            MergewellError: the name is taken or is not that of a file.
            OutputError: the system refuses; and whatever `write` raises.
        """
        self._require_free(name)
        path = self._staging.files / name
        write(path)
        digest = hash_file(path, self._algorithm)
        self._others[name] = OutputFile(file=name, hash=digest, bytes=path.stat().st_size)
        return self._others[name]

    def commit(self, manifest: Mapping[str, Any]) -> Manifest:
        """Finish all shards, write index and manifest, and give the folder its name.

        `manifest` holds the fields of `Manifest` but `outputs`, which are added here.

        Raises:
            MergewellError: some elements were not written.
            OutputError: the system refuses, or the output's name was taken meanwhile.
        """
        for layout in self.pending:
            self.finish(layout.file)
        if len(self._layouts) > 1 and INDEX not in self._others:
            self.add_file(INDEX, self._index())
        complete = Manifest.model_validate({**manifest, "outputs": self.outputs})
        files = self._staging.files
        with writing(self.directory):
            known = {output.file for output in self.outputs}
            for stray in (path for path in files.iterdir() if path.name not in known):
                stray.unlink()  # half a file that an earlier, killed run left
            # The manifest comes last: whoever sees it sees files that are complete. Then the
            # names in the folder, the folder's own name, and that name in the parent.
            text = complete.model_dump_json(indent=2) + "\n"
            write_synced(files / MANIFEST, text.encode())
            sync_folder(files)
            os.rename(files, self.directory)  # noqa: PTH104 - injected failures patch `os`
            try:
                sync_folder(self.directory.parent)
            finally:
                self._release(remove=True)  # the output is complete whatever became of the wait
        return complete

    def abort(self, *, keep: bool) -> None:
        """Stop; `keep` leaves what is finished for a writer with `resume=True`."""
        self._release(remove=not keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort(keep=bool(self._done))

    def _shard(self, file: str) -> ShardWriter:
        with self._opening:
            if file in self._done:
                raise MergewellError(f"{file} of {self.directory} is finished already.")
            if file not in self._shards:
                self._shards[file] = ShardWriter(
                    self._staging,
                    self._layouts[file],
                    metadata=self._metadata,
                    key=self._key,
                    algorithm=self._algorithm,
                )
            return self._shards[file]

    def _require_free(self, name: str) -> None:
        taken = name in {*self._layouts, *self._others, MANIFEST}
        if taken or not name or Path(name).name != name:
            raise MergewellError(f"{name!r} cannot be added to {self.directory}.")

    def _release(self, *, remove: bool) -> None:
        """Close everything and give up the lock; does nothing the second time."""
        if self._lock < 0:
            return
        for shard in self._shards.values():
            shard.close()
        if remove:
            # While the lock is held, so that no other writer's folder can be meant.
            shutil.rmtree(self._staging.root, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    def _index(self) -> bytes:
        size = sum(s.nbytes for layout in self._layouts.values() for s in layout.specs)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(self._homes.items()))}
        return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()

    def _require_space(self, sizes: Mapping[str, int]) -> None:
        """Require room for the files named and 1 % more; what they take up already counts."""
        present = (self._staging.files / file for file in sizes)
        held = sum(path.stat().st_blocks * 512 for path in present if path.exists())
        needed = sum(sizes.values()) * 101 // 100
        disk = os.statvfs(self._staging.root)
        free = disk.f_bavail * disk.f_frsize + held
        if needed > free:
            raise OutputError(
                f"{self.directory} needs {needed:,} bytes but its disk has {free:,} left; "
                "free space or choose another disk."
            )


def require_free_name(directory: Path) -> None:
    """Refuse an output that exists, unless it is an empty folder.

    Raises:
        OutputError: it exists, or cannot be looked at.
    """
    with writing(directory):
        is_empty = directory.is_dir() and not any(directory.iterdir())
    if directory.exists() and not is_empty:
        raise OutputError(
            f"{directory} exists already and nothing is overwritten; "
            "choose another name or remove it."
        )
