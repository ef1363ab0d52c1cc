"""JSON files, read with no tolerance: an object, UTF-8, and every key once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergewell.errors import CheckpointError


def parse_object(text: bytes, *, where: str, remedy: str) -> dict[str, Any]:
    """Return the JSON object in `text`; `where` begins the error's sentence, `remedy` ends it.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, or a key that stands twice.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise CheckpointError(f"{where} is nested too deeply; {remedy}.") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{where} is not valid JSON ({error}); {remedy}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object; {remedy}.")
    return value  # pyright: ignore[reportUnknownVariableType]


def read_object(path: Path, *, remedy: str) -> dict[str, Any]:
    """Return the JSON object in the file `path`.

    Raises:
        CheckpointError: the file cannot be read or is no JSON object.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {remedy}.") from error
    return parse_object(text, where=str(path), remedy=remedy)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} stands twice")
        result[key] = value
    return result
