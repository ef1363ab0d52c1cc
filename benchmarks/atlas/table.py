"""Rows into tables, results/{experts,merges,tasks,alone}.FAMILY.csv.gz, and what correlates.

    python benchmarks/atlas/table.py [--cache DIR] [--correlate]

`merges`: a row a merge, with mean and least retention and one column a predictor; `tasks`: a row an
expert of a merge, with its accuracies and its own predictors. Rows that stand in the tables already
are kept: a machine without the cache adds to them.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from book import Book, Row, rounded

RESULTS = Path(__file__).parent / "results"
EXPERT = ("family", "expert")
PAIR = ("family", "base", "expert")
MERGE = ("family", "base", "set", "merge")
TASK = (*MERGE, "place")
PLAIN = ("reason", "method", "parameters", "coefficients", "seed", "experts", "tasks", "error")
PER_TASK = ("merged", "own", "below", "ensemble", "agreement", "chance", "tested")
SECONDS = ("set_s", "merge_s", "test_s", "weights_s", "inputs_s", "gradients_s")
MEASURED = (
    "retention", "retention_min", "above_chance", "gain", "gained", "merged", "own", "below",
    "ensemble", "agreement", "chance", "tested",
)  # fmt: skip
FIRST_COLUMNS = (
    *MERGE, "place", "expert", "task", "coefficient", "kind", "parent", "step", *PLAIN, *MEASURED,
    *SECONDS,
)  # fmt: skip
FEWEST = 0.03
"""What an expert must be above the base to be asked how much of that was kept."""


def known(table: str, family: str) -> list[Row]:
    """Return the rows of a table that is in the repository, with their keys as they were."""
    path = RESULTS / f"{table}.{family}.csv.gz"
    if not path.exists():
        return []
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return [typed(row) for row in csv.DictReader(file)]


def typed(row: dict[str, str]) -> Row:
    """Return a row with numbers as numbers; empty cells are left out."""
    return {key: _value(text) for key, text in row.items() if text != ""}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def merge_row(row: Row) -> Row:
    """Return a merge's row as it stands in the table."""
    found = {key: row[key] for key in MERGE}
    found |= {k: row[k] for k in PLAIN if k in row}
    if "error" in row:
        return found
    merged, own, below, chance = (np.array(row[k]) for k in ("merged", "own", "below", "chance"))
    kept = merged / np.maximum(own, 1e-9)
    above = (merged - chance) / np.maximum(own - chance, FEWEST)
    gained = own - below >= FEWEST
    gain = (merged - below)[gained] / (own - below)[gained]
    found |= {
        "retention": kept.mean(), "retention_min": kept.min(), "above_chance": above.mean(),
        "gain": gain.mean() if gained.any() else None, "gained": int(gained.sum()),
        "merged": merged.mean(), "own": own.mean(), "below": below.mean(),
        "ensemble": np.mean(row["ensemble"]), "agreement": np.mean(row["agreement"]),
    }  # fmt: skip
    return found | row["predictors"] | {key: row[key] for key in SECONDS}


def task_rows(row: Row) -> Iterable[Row]:
    """Yield a row for each expert of a merge."""
    for place, (expert, task) in enumerate(zip(row["experts"], row["tasks"], strict=True)):
        found: Row = {**{key: row[key] for key in MERGE}, "place": place, "method": row["method"]}
        found |= {"expert": expert, "task": task, "coefficient": row["coefficients"][place]}
        found |= {key: row[key][place] for key in PER_TASK}
        yield found | {key: values[place] for key, values in row["each"].items()}


def write(table: str, family: str, rows: Sequence[Row]) -> Path:
    """Write a table: the same bytes for the same rows."""
    columns = sorted({k for row in rows for k, v in row.items() if _cell(v)}, key=_place)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    path = RESULTS / f"{table}.{family}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(text.getvalue().encode())
    return path


def _place(column: str) -> tuple[bool, int, str]:
    """Return where a column stands: those named here first, then predictors by name."""
    fixed = column in FIRST_COLUMNS
    return not fixed, FIRST_COLUMNS.index(column) if fixed else 0, column


def _cell(value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, dict | list):
        return json.dumps(rounded(value), separators=(",", ":"))
    return str(rounded(float(value)) if isinstance(value, float | np.floating) else value)


def tabulate(cache: Path, family: str) -> None:
    """Write the four tables of a family from its rows and from the tables there are."""
    folder = cache / family
    experts = Book(folder / "experts.jsonl", EXPERT, known("experts", family))
    write("experts", family, list(experts.rows.values()))
    pairs = Book(folder / "alone.jsonl", PAIR, known("alone", family)).rows.values()
    write("alone", family, sorted(pairs, key=lambda row: (row["base"], row["expert"])))
    again = Book(folder / "again.jsonl", MERGE).rows
    fresh = [
        _joined(row, again.get(key, {}))
        for key, row in Book(folder / "merges.jsonl", MERGE).rows.items()
    ]
    merges = Book(Path("/nonexistent"), MERGE, known("merges", family))
    tasks = Book(Path("/nonexistent"), TASK, known("tasks", family))
    for row in fresh:
        merges.rows[merges.key(row)] = merge_row(row)
        for part in task_rows(row) if "error" not in row else ():
            tasks.rows[tasks.key(part)] = part
    for name, rows in (("merges", merges), ("tasks", tasks)):
        path = write(name, family, _sorted(rows.rows.values()))
        print(f"{path.name}: {len(rows.rows)} rows, {path.stat().st_size / 1e6:.2f} MB")


def _joined(row: Row, again: Row) -> Row:
    """Return a row with what `again.py` found of the same merge later."""
    return {**row, **{k: row.get(k, {}) | again[k] for k in ("predictors", "each") if k in again}}


def _sorted(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda r: (r["base"], r["set"], r["merge"], r.get("place", 0)))


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Return the rank correlation of two columns, ties sharing their mean rank."""
    left, right = _ranks(one), _ranks(other)
    if left.std() == 0 or right.std() == 0:
        return float("nan")
    return float(np.corrcoef(left, right)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse]


def correlations(rows: Sequence[Row], target: str) -> list[tuple[str, float, int]]:
    """Return every predictor's rank correlation with a target, strongest first, and its rows."""
    names = dict.fromkeys(k for row in rows for k in row if k[:2] in ("w_", "u_", "l_"))
    found: list[tuple[str, float, int]] = []
    for name in names:
        held = [r for r in rows if isinstance(r.get(name), int | float) and target in r]
        pairs = np.array([(r[name], r[target]) for r in held], float).reshape(-1, 2)
        pairs = pairs[np.isfinite(pairs).all(1)]
        if len(pairs) > 20:
            found.append((name, spearman(pairs[:, 0], pairs[:, 1]), len(pairs)))
    return sorted(found, key=lambda one: -abs(one[1]) if one[1] == one[1] else 0)


def main() -> None:
    """Write the tables of every family that has rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/mergewell/atlas")
    parser.add_argument("--correlate", action="store_true")
    given = parser.parse_args()
    for folder in sorted(given.cache.iterdir() if given.cache.exists() else ()):
        if (folder / "experts.jsonl").exists():
            tabulate(given.cache, folder.name)
    families = sorted(path.name.split(".")[1] for path in RESULTS.glob("merges.*.csv.gz"))
    for family in families if given.correlate else ():
        rows = [row for row in known("merges", family) if "error" not in row]
        print(f"{family}: {len(rows)} merges; Spearman with mean retention, with least retention")
        least = {name: rho for name, rho, _ in correlations(rows, "retention_min")}
        for name, rho, count in correlations(rows, "retention"):
            print(f"  {name:36s} {rho:6.2f} {least[name]:6.2f}  {count}")


if __name__ == "__main__":
    main()
