"""Files of the report: JSON read strictly, text written whole, faults told in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from mergewell.errors import DataError, OutputError

_GENERATED = b'<meta name="generator" content="mergewell">'
_HEAD = 1 << 16
"""Bytes of a page that its head is looked for in."""
_CHECKED = b'"verdict":'


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


def write_page_text(path: Path, text: str) -> Path:
    """Write a page as `write_text` does, but over nothing that is not a page of mergewell.

    Raises:
        OutputError: something else stands there, or the folder cannot be written.
    """
    require_own_page(path)
    return write_text(path, text)


def require_own_page(path: Path) -> None:
    """Require that a page can be written without loss of what mergewell did not make.

    Raises:
        OutputError: something stands there that is no page of mergewell.
    """
    _require_own(path, lambda content: _GENERATED in content[:_HEAD], "page")


def require_own_check(path: Path) -> None:
    """Require that the JSON of a check can be written in the same way.

    Raises:
        OutputError: something stands there that is no check of mergewell.
    """
    _require_own(path, lambda content: _CHECKED in content, "check")


def _require_own(path: Path, is_own: Callable[[bytes], bool], what: str) -> None:
    try:
        if not path.exists() or (path.is_file() and is_own(path.read_bytes())):
            return
    except OSError as error:
        raise OutputError(
            f"{path} cannot be looked at ({error.strerror}); choose another name."
        ) from error
    raise OutputError(
        f"{path} exists already and is no {what} of mergewell; choose another name or remove it."
    )


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
