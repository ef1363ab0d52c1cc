"""The safetensors header: read and checked, or built.

A file is a little-endian 64-bit length, a JSON object of that many bytes, and the elements.
Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from mergewell.errors import CheckpointError
from mergewell.storage.spec import TensorSpec, dtype_from_name, dtype_name
from mergewell.storage.strict_json import parse_object

HEADER_LIMIT = 100_000_000
"""Longest header in bytes, the official library's limit."""

_REMEDY = "download or save the file again"
_FIELDS = {"dtype", "shape", "data_offsets"}
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the elements, with every tensor's place in the file."""

    specs: Mapping[str, TensorSpec]
    """Tensors in the order of their places."""

    offsets: Mapping[str, int]
    """Byte in the file at which each tensor begins."""

    metadata: Mapping[str, str]
    """Free text that the writer added."""

    start: int
    """Byte in the file at which the elements begin."""

    size: int
    """Bytes of the whole file."""


def read_header(path: Path) -> Header:
    """Return the checked header of the safetensors file `path`.

    Raises:
        CheckpointError: the file cannot be read or breaks any rule of the format.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length_field = file.read(8)
            length = int.from_bytes(length_field, "little")
            if len(length_field) < 8:
                raise CheckpointError(
                    f"{path} has {size} bytes, too few for a safetensors file; {_REMEDY}."
                )
            if length > HEADER_LIMIT:
                raise CheckpointError(
                    f"{path} announces a header of {length} bytes, above the limit of "
                    f"{HEADER_LIMIT}; it is no safetensors file or damaged: {_REMEDY}."
                )
            if length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated within its header ({size} bytes, the header alone "
                    f"takes {8 + length}); {_REMEDY}."
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions."
        ) from error
    return parse_header(text, size=size, path=path)


def parse_header(text: bytes, *, size: int, path: Path) -> Header:
    """Return the checked header in `text`, that of a file `path` of `size` bytes.

    Raises:
        CheckpointError: any rule of the format is broken; names file and tensor.
    """
    where = f"{path}: the header"
    if not text.startswith(b"{"):
        raise CheckpointError(f"{where} does not begin with '{{'; {_REMEDY}.")
    entries = parse_object(text, where=where, remedy=_REMEDY)
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    places = sorted((_place(name, entry, path) for name, entry in entries.items()), key=_order)
    start, position = 8 + len(text), 0
    for begin, end, spec in places:
        if begin != position:
            defect = "a hole before it" if begin > position else "an overlap with another tensor"
            raise CheckpointError(
                f"{path}: tensor {spec.name!r} begins at byte {begin} of the elements where "
                f"{position} is due, {defect}; {_REMEDY}."
            )
        if end - begin != spec.nbytes:
            raise CheckpointError(
                f"{path}: tensor {spec.name!r} has {end - begin} bytes where its dtype and shape "
                f"{list(spec.shape)} need {spec.nbytes}; {_REMEDY}."
            )
        position = end
    if start + position != size:
        defect = "truncated" if start + position > size else "followed by bytes of no tensor"
        raise CheckpointError(
            f"{path} is {defect} ({size} bytes where the header announces {start + position}); "
            f"{_REMEDY}."
        )
    return Header(
        specs={spec.name: spec for _, _, spec in places},
        offsets={spec.name: start + begin for begin, _, spec in places},
        metadata=metadata,
        start=start,
        size=size,
    )


def build_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """Return the first bytes of a file that holds `specs` in this order, and their header.

    The same arguments give the same bytes; the elements begin at a multiple of 8.

    Raises:
        CheckpointError: a name stands twice, or the header would be above the limit.
    """
    planned = tuple(specs)
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    ends = [0]
    for spec in planned:
        if spec.name in entries or spec.name == "__metadata__":
            raise CheckpointError(f"Tensor {spec.name!r} cannot be written twice; rename one.")
        ends.append(ends[-1] + spec.nbytes)
        entries[spec.name] = {
            "dtype": dtype_name(spec.dtype, where=f"tensor {spec.name!r}"),
            "shape": list(spec.shape),
            "data_offsets": ends[-2:],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise CheckpointError(
            f"A header of {len(text)} bytes is above the limit of {HEADER_LIMIT}; "
            "write the tensors to several files."
        )
    start = 8 + len(text)
    header = Header(
        specs={spec.name: spec for spec in planned},
        offsets={
            spec.name: start + begin
            for spec, (begin, _) in zip(planned, pairwise(ends), strict=True)
        },
        metadata=dict(metadata),
        start=start,
        size=start + ends[-1],
    )
    return len(text).to_bytes(8, "little") + text, header


def _order(place: tuple[int, int, TensorSpec]) -> tuple[int, int]:
    return place[:2]  # an empty tensor comes before the one that begins at the same byte


def _metadata(value: object, path: Path) -> dict[str, str]:
    if isinstance(value, dict):
        items = cast("dict[str, object]", value).items()
        texts = {key: text for key, text in items if isinstance(text, str)}
        if len(texts) == len(items):
            return texts
    raise CheckpointError(f"{path}: '__metadata__' must map texts to texts; {_REMEDY}.")


def _place(name: str, entry: object, path: Path) -> tuple[int, int, TensorSpec]:
    where = f"{path}: tensor {name!r}"
    fields = cast("dict[str, object]", entry) if isinstance(entry, dict) else {}
    if fields.keys() != _FIELDS:
        raise CheckpointError(
            f"{where} must have exactly the fields {', '.join(sorted(_FIELDS))}; {_REMEDY}."
        )
    dtype = dtype_from_name(fields["dtype"], where=where)
    shape = _naturals(fields["shape"])
    if shape is None:
        raise CheckpointError(
            f"{where}: shape {fields['shape']!r} is not a list of whole numbers from 0; {_REMEDY}."
        )
    spec = TensorSpec(name, dtype, shape)
    if spec.nbytes > _LARGEST:
        raise CheckpointError(f"{where}: shape {list(shape)} overflows 64 bits; {_REMEDY}.")
    offsets = _naturals(fields["data_offsets"])
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets {fields['data_offsets']!r} are not a begin and an end; "
            f"{_REMEDY}."
        )
    return offsets[0], offsets[1], spec


def _naturals(value: object) -> tuple[int, ...] | None:
    """Return a JSON list of whole numbers from 0 to 2^63 - 1, or None; `true` is no number."""
    if not isinstance(value, list):
        return None
    found: list[int] = []
    for item in cast("list[object]", value):
        if type(item) is not int or not 0 <= item <= _LARGEST:
            return None
        found.append(item)
    return tuple(found)
