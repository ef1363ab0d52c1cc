"""Rows that are appended as they finish: JSON lines, the last of a key counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Book:
    """The rows of one file; rows of a table made before count as known."""

    def __init__(self, path: Path, keys: Sequence[str], before: Sequence[Row] = ()) -> None:
        self.path, self._keys = path, keys
        self.rows: dict[str, Row] = {self.key(row): row for row in before}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):  # the last line of a killed run may be cut
                    row = json.loads(line)
                    self.rows[self.key(row)] = row

    def key(self, row: Row) -> str:
        """Return what tells rows apart."""
        return json.dumps([row[key] for key in self._keys])

    def add(self, row: Row) -> None:
        """Append a row to the file."""
        self.rows[self.key(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded(row)) + "\n")

    def has(self, row: Row) -> bool:
        """Return whether a row of this key is there."""
        return self.key(row) in self.rows


def rounded(value: Any) -> Any:
    """Return data with numbers to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value
