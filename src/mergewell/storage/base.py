"""Checkpoint: a read-only mapping from tensor names to tensors, whatever the files behind it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from mergewell.errors import CheckpointError, did_you_mean
from mergewell.storage.spec import TensorSpec
from mergewell.storage.weight_file import WeightFile


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint, and the tensors in it by their places."""

    file: str
    names: tuple[str, ...]


class Checkpoint(Mapping[str, Tensor]):
    """A read-only mapping from tensor names to tensors; only headers are read on opening.

    `len` and iteration count every tensor once; a tied name (see `aliases`) can be read too.
    Reads may come from any thread. A pickled checkpoint opens its files again when first read.
    """

    path: Path
    """What was opened: a file or a folder."""

    specs: Mapping[str, TensorSpec]
    """Tensors by name, in the order of the files."""

    aliases: Mapping[str, str]
    """Tied names and the kept name, under which the tensor stands in `specs`."""

    shards: tuple[Shard, ...]
    """Files and their tensors, by file name."""

    files: tuple[Path, ...]
    """Files of weights."""

    metadata: Mapping[str, str]
    """Free text in the headers of the files."""

    config: Mapping[str, Any] | None
    """The `config.json` beside the weights, if any."""

    side_files: tuple[Path, ...]
    """Configuration and tokenizer files that a merged folder should hold as well."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor, flat, in the stored dtype.

        No copy where the file allows it, so the result is for reading: a change in place would
        be seen by later reads, though never by the file.

        Raises:
            CheckpointError: there is no such tensor, or its file changed since the opening.
            IndexError: the block is not within the tensor.
        """
        spec = self.spec(name)
        end = spec.numel if stop is None else stop
        if not 0 <= start <= end <= spec.numel:
            raise IndexError(f"{name}: block [{start}, {end}) of {spec.numel} elements.")
        return self._read_block(spec, start, end)

    def spec(self, name: str) -> TensorSpec:
        """Return the spec of a tensor, by its kept or a tied name.

        Raises:
            CheckpointError: there is no such tensor; suggests the nearest.
        """
        found = self.specs.get(self.aliases.get(name, name))
        if found is None:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}: {did_you_mean(name, self.specs)}"
            )
        return found

    def side_file(self, file: Path) -> bytes:
        """Return the bytes of one of the `side_files`, as a model made from these tensors has it.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            return file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}); check it.") from error

    @property
    def content_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(spec.nbytes for spec in self.specs.values())

    def weight_files(self) -> tuple[WeightFile, ...]:
        """Return the opened files behind this checkpoint, as far as it reads them itself."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""

    @abstractmethod
    def _read_block(self, spec: TensorSpec, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the tensor, which is known to hold them."""

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self.read(name).reshape(self.spec(name).shape)

    def __contains__(self, name: object) -> bool:
        return name in self.specs or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} tensors)"

    # A checkpoint is a resource, not a value: comparing as mappings do would read every element.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)
