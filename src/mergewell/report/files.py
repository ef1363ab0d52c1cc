"""Files of the report: JSON read strictly, text written whole, faults told in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from mergewell.errors import DataError, OutputError


def write_text(path: Path, text: str) -> Path:
    """Write a whole text file under a temporary name, then rename it.

    Raises:
        OutputError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror}); choose another folder."
        ) from error
    return path


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """

    def refuse(constant: str) -> NoReturn:
        raise DataError(f"{path} holds {constant}, which is not JSON; write null instead.")

    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); name a folder that `mergewell demo` wrote."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text at byte {error.start}; make it again."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not JSON at line {error.lineno}, column {error.colno}; make it again."
        ) from error
    if not isinstance(data, dict):
        raise DataError(f"{path} holds no JSON object; make it again.")
    return data  # pyright: ignore[reportUnknownVariableType]


def sentence(error: ValidationError, where: str) -> str:
    """Return what broke the contract as one sentence that says `where`."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{where} lacks {field!r}; make it again with this version of mergewell."
    if field == "version":
        return f"{where} is of version {first['input']!r}, but 1 is read here; update mergewell."
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "finite_number":
        reason = "it is NaN or infinite; give null or leave it out"
    shown = "" if isinstance(first["input"], dict | list | BaseModel) else f" = {first['input']!r}"
    return f"{where}: {field or 'the whole'}{shown} is refused: {reason}."
