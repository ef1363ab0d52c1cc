"""The manifest: what a merged folder says of itself, and the check that it is still true."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergewell.errors import CheckpointError
from mergewell.storage.strict_json import read_object

MANIFEST = "manifest.json"

Algorithm = Literal["xxh3-128", "sha256"]
"""xxh3-128 finds accidents at the speed of memory; sha256 also withstands an adversary."""

_CHUNK = 1 << 20


class Hasher(Protocol):
    """What hashlib and xxhash have in common."""

    def update(self, data: Any, /) -> None:
        """Take more bytes in."""

    def hexdigest(self) -> str:
        """Return the hash so far."""
        ...


def new_hasher(algorithm: Algorithm) -> Hasher:
    """Return an empty hasher."""
    return hashlib.sha256() if algorithm == "sha256" else xxhash.xxh3_128()


def hash_file(path: Path, algorithm: Algorithm = "xxh3-128") -> str:
    """Return a file's hash as "algorithm:hexadecimal".

    Raises:
        CheckpointError: the file cannot be read.
    """
    hasher = new_hasher(algorithm)
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check it.") from error
    return f"{algorithm}:{hasher.hexdigest()}"


class _Contract(BaseModel):
    # Fields may be added by later versions, so a reader keeps what it does not know.
    model_config = ConfigDict(frozen=True, extra="allow")


class InputFile(_Contract):
    """A file that was merged."""

    path: str
    hash: str
    bytes: int


class OutputFile(_Contract):
    """A file of the merged folder."""

    file: Annotated[str, Field(pattern=r"^[^/\\\\]+$")]
    """Name in the folder: a manifest cannot point outside it."""

    hash: str
    bytes: int


class Manifest(_Contract):
    """The contents of `manifest.json` (DESIGN.md section 7)."""

    version: Literal[1] = 1
    recipe: Mapping[str, Any]
    inputs: tuple[InputFile, ...]
    outputs: tuple[OutputFile, ...]
    tensors: int
    tensors_changed: int
    relative_change: float | None = None
    """Norm of all that changed over the norm of the base (or first expert)."""
    relative_changes: Mapping[str, float | None] = {}
    """The same by tensor, of those that changed."""
    seed: int
    versions: Mapping[str, str]
    directory: str = "."
    """Where the merge was run: what relative paths are relative to."""
    seconds: float


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a merged folder.

    Raises:
        CheckpointError: there is none, or it is malformed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}; give a folder that mergewell wrote.")
    content = read_object(path, remedy="merge again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {field!r}: {first['msg']}; merge again.") from error


def verify_files(folder: Path) -> list[str]:
    """Return what is wrong with a merged folder's files, a sentence each; nothing if all is well.

    Raises:
        CheckpointError: there is no readable manifest.
    """
    outputs = {output.file: output for output in read_manifest(folder).outputs}
    problems: list[str] = []
    for name, output in outputs.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing.")
        elif path.stat().st_size != output.bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes where {output.bytes} are due.")
        elif (
            hash_file(path, algorithm_of(output.hash, where=f"{folder / MANIFEST}: {name}"))
            != output.hash
        ):
            problems.append(f"{name} changed: its hash is not the one in {MANIFEST}.")
    weights = (path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    problems += [
        f"{path.name} is not in {MANIFEST}." for path in sorted(weights) if path.name not in outputs
    ]
    return problems


def algorithm_of(digest: str, *, where: str) -> Algorithm:
    """Return the kind of a hash, "algorithm:hexadecimal"; `where` begins the error's sentence.

    Raises:
        CheckpointError: the kind is unknown.
    """
    match digest.partition(":")[0]:
        case "sha256":
            return "sha256"
        case "xxh3-128":
            return "xxh3-128"
        case other:
            raise CheckpointError(
                f"{where} has a hash of unknown kind {other!r}; "
                "use the version of mergewell that wrote it."
            )
