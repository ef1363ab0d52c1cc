"""The rows of a benchmark to one line a method: means over seeds, both ways of tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from book import Book, Row, chosen

from mergewell.learners.base import LEARNERS
from mergewell.methods.base import METHODS

Tuning = Literal["labels", "unlabelled"]
TUNINGS: tuple[Tuning, ...] = ("labels", "unlabelled")


@dataclass(frozen=True)
class Line:
    """A method's result under one way of tuning, over the seeds that have it."""

    seeds: tuple[int, ...]
    mean: float
    low: float
    high: float
    """Ends of the 95 % interval over test examples, means over the seeds."""
    spread: tuple[float, float]
    """Smallest and largest mean among the seeds."""
    worst: float
    worst_task: str
    worst_kept: float
    over: dict[str, tuple[float, float, float]]
    over_seeds: dict[str, tuple[float, float]]
    """Smallest and largest gain among the seeds."""
    settings: tuple[str, ...]
    validation: float

    def as_data(self) -> dict[str, Any]:
        """Return what stands in quality.json."""
        return {
            "seeds": len(self.seeds), "mean": self.mean, "worst": self.worst, "low": self.low,
            "high": self.high, "worst_task": self.worst_task, "worst_kept": self.worst_kept,
            "seed_low": self.spread[0], "seed_high": self.spread[1],
            "over": {name: list(gain) for name, gain in self.over.items()},
            "over_seeds": {name: list(ends) for name, ends in self.over_seeds.items()},
            "settings": list(self.settings),
        }  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A method or learner: what it needs and its two lines."""

    name: str
    data: str
    lines: dict[Tuning, Line]
    merge_s: float


def methods(book: Book) -> list[Method]:
    """Return the methods that have a test row: most seeds first, then the best validation score."""
    found: list[Method] = []
    for name in {row["method"]: None for row in book.rows.values() if row["kind"] == "test"}:
        tried = [r for r in book.rows.values() if r["kind"] == "candidate" and r["method"] == name]
        tunings = TUNINGS[:1] if data_of(name) == "labelled" else TUNINGS
        lines = {tuning: line(book, name, tuning) for tuning in tunings}
        seconds = [row["merge_s"] for row in tried if "error" not in row]
        known = {tuning: one for tuning, one in lines.items() if one is not None}
        if known:
            found.append(Method(name, data_of(name), known, max(seconds)))

    def place(method: Method) -> tuple[int, float]:
        line = method.lines["labels"]
        return -len(line.seeds), -sign(book) * line.validation

    return sorted(found, key=place)


def sign(book: Book) -> int:
    """Return 1 where higher is better, -1 for perplexity."""
    return -1 if book.path.stem == "language" else 1


def line(book: Book, name: str, tuning: Tuning) -> Line | None:
    """Return a method's result under one way of tuning; none where no seed is finished."""
    rows: list[Row] = []
    validation: list[float] = []
    settings: list[str] = []
    for seed in sorted({row["seed"] for row in book.rows.values()}):
        tried = [
            row
            for row in book.rows.values()
            if row["kind"] == "candidate"
            and (row["seed"], row["method"]) == (seed, name)
            and "error" not in row
        ]
        if not tried:
            continue
        pick = chosen(tried)[TUNINGS.index(tuning)]
        row = book.known({**pick, "kind": "test"})
        if row is not None and "error" not in row:
            rows.append(row)
            validation.append(pick["validation"])
            settings.append(setting(pick))
    if not rows:
        return None
    low, high, mean = (float(np.mean([r[key] for r in rows])) for key in ("low", "high", "mean"))
    worst = min(rows, key=lambda row: row["worst_kept"])
    names = [name for name in rows[0]["over"] if all(name in row["over"] for row in rows)]
    return Line(
        seeds=tuple(row["seed"] for row in rows), mean=mean, low=low, high=high,
        spread=ends([row["mean"] for row in rows]),
        worst=worst["worst"], worst_task=worst["worst_task"], worst_kept=worst["worst_kept"],
        over={n: averaged([row["over"][n] for row in rows]) for n in names},
        over_seeds={n: ends([row["over"][n][0] for row in rows]) for n in names},
        settings=tuple(settings), validation=float(np.mean(validation)),
    )  # fmt: skip


def averaged(gains: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the mean over seeds of (value, low, high)."""
    value, low, high = np.mean(np.array(gains), axis=0).tolist()
    return value, low, high


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the largest."""
    return min(values), max(values)


def setting(row: Row) -> str:
    """Return a candidate in a few words."""
    words = [f"{key} {value}" for key, value in row["parameters"].items() if key != "scale"]
    return ", ".join([*words, f"× {row['scale']:g}"])


def data_of(name: str) -> str:
    """Return what a method needs: "weights", "unlabelled" or "labelled"."""
    if name in METHODS.names():
        return "unlabelled" if METHODS.get(name).needs.calibration else "weights"
    return LEARNERS.get(name).data


def failures(book: Book) -> dict[str, str]:
    """Return the methods of which no candidate could be made, each with its error."""
    failed: dict[str, str] = {}
    worked: set[str] = set()
    for row in book.rows.values():
        if row["kind"] == "candidate" and "error" in row:
            failed.setdefault(row["method"], row["error"])
        elif row["kind"] == "candidate":
            worked.add(row["method"])
    return {name: error for name, error in failed.items() if name not in worked}


def references(book: Book) -> dict[str, list[Row]]:
    """Return base, experts and ensemble, by name, one row a seed."""
    found: dict[str, list[Row]] = {}
    for row in book.rows.values():
        if row["kind"] == "reference":
            found.setdefault(row["method"], []).append(row)
    return found
