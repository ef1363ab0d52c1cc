"""The manifest: what a merged folder says of itself, and the check that it is still true."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import mergewell
from mergewell.errors import CheckpointError
from mergewell.storage.strict_json import parse_object

MANIFEST = "manifest.json"

Algorithm = Literal["xxh3-128", "sha256"]
"""xxh3-128 finds accidents at the speed of memory; sha256 also withstands an adversary."""

OnBytes = Callable[[int], None]
"""Called with the bytes that were just hashed."""

_CHUNK = 1 << 20


class Hasher(Protocol):
    """What hashlib and xxhash have in common."""

    def update(self, data: Any, /) -> None:
        """Take more bytes in."""

    def hexdigest(self) -> str:
        """Return the hash so far."""
        ...


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on, as a manifest holds them."""
    return {
        "mergewell": mergewell.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def new_hasher(algorithm: Algorithm) -> Hasher:
    """Return an empty hasher."""
    return hashlib.sha256() if algorithm == "sha256" else xxhash.xxh3_128()


def hash_file(
    path: Path, algorithm: Algorithm = "xxh3-128", *, on_bytes: OnBytes | None = None
) -> str:
    """Return a file's hash as "algorithm:hexadecimal".

    Raises:
        CheckpointError: the file cannot be read.
    """
    hasher = new_hasher(algorithm)
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
                if on_bytes is not None:
                    on_bytes(len(chunk))
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


def input_file(path: Path, algorithm: Algorithm, *, known: str | None = None) -> InputFile:
    """Return the record of a file, of its `known` hash if it was made before.

    Raises:
        CheckpointError: the file cannot be read.
    """
    digest = hash_file(path, algorithm) if known is None else known
    return InputFile(path=str(path), hash=digest, bytes=path.stat().st_size)


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
    """Of what merged, and under "device" where the arithmetic was done."""
    directory: str = "."
    """Where the merge was run: what relative paths are relative to."""
    seconds: float
    """Of work; what shard jobs and runs that were broken off spent on finished files is added."""

    @property
    def device(self) -> str:
        """Where the arithmetic was done."""
        return self.versions.get("device", "cpu")


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a merged folder.

    Raises:
        CheckpointError: there is none, or it is malformed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}; give a folder that mergewell wrote.")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check it.") from error
    return parse_manifest(text, path)


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """Return the manifest that stood at `path` with this text.

    Raises:
        CheckpointError: it is malformed.
    """
    content = parse_object(text, where=str(path), remedy="merge again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {field!r}: {first['msg']}; merge again.") from error


def repair_of(manifest: Manifest) -> Mapping[str, Any]:
    """Return what a manifest says of a repair; nothing where none was made."""
    found: object = (manifest.model_extra or {}).get("repair")
    return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}


def manifest_at(path: Path) -> Manifest | None:
    """Return the manifest in a file of any name, or None where something else stands.

    Raises:
        CheckpointError: the manifest is malformed.
    """
    if path.suffix != ".json":
        return None
    try:
        text = path.read_bytes()
        content = parse_object(text, where=str(path), remedy="mend it")
    except (OSError, CheckpointError):
        return None
    return parse_manifest(text, path) if content.keys() >= {"recipe", "outputs"} else None


def changed_inputs(before: Manifest, after: Manifest) -> list[str]:
    """Return the files that one merge read and another, of the same recipe, had others for.

    They are told by their hashes, wherever they lie; hashes of two kinds say nothing.
    """
    kinds = {file.hash.partition(":")[0] for file in after.inputs}
    found = {file.hash for file in after.inputs}
    return [
        file.path
        for file in before.inputs
        if file.hash not in found and file.hash.partition(":")[0] in kinds
    ]


def verify_files(folder: Path, *, on_bytes: OnBytes | None = None) -> list[str]:
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
        elif not has_hash(
            path, output.hash, where=f"{folder / MANIFEST}: {name}", on_bytes=on_bytes
        ):
            problems.append(f"{name} changed: its hash is not the one in {MANIFEST}.")
    weights = (path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    problems += [
        f"{path.name} is not in {MANIFEST}." for path in sorted(weights) if path.name not in outputs
    ]
    return problems


def has_hash(path: Path, digest: str, *, where: str, on_bytes: OnBytes | None = None) -> bool:
    """Return whether a file has a hash of whatever kind; `where` begins the error's sentence.

    Raises:
        CheckpointError: the file cannot be read, or the kind is unknown.
    """
    return hash_file(path, algorithm_of(digest, where=where), on_bytes=on_bytes) == digest


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
