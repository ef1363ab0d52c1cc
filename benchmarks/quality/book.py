"""The rows of a benchmark: JSON lines, appended as they finish; the last of a key counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""kind "candidate" (validation examples), "test" (of a chosen candidate) or "reference" (base,
experts, ensemble); seed, method, parameters and scale; what was measured, or "error"."""

KEYS = ("kind", "seed", "method", "parameters", "scale")


class Book:
    """The rows of one benchmark's file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[key_of(row)] = row

    def add(self, row: Row) -> Row:
        """Append a row to the file."""
        self.rows[key_of(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded(row)) + "\n")
        return row

    def known(self, row: Row) -> Row | None:
        """Return the row that stands under the key of `row`."""
        return self.rows.get(key_of(row))


def key_of(row: Row) -> str:
    """Return what tells rows apart."""
    return json.dumps([row.get(key) for key in KEYS], sort_keys=True)


def chosen(rows: Sequence[Row]) -> tuple[Row, Row]:
    """Return the candidates that are chosen with labels and without.

    With: the best mean score on the validation examples. Without: the smallest KL to each input's
    own expert on the unlabelled inputs. The first of equal ones.
    """
    return max(rows, key=lambda row: row["score"]), min(rows, key=lambda row: row["kl_routed"])


def rounded(value: Any) -> Any:
    """Return data with numbers to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value
