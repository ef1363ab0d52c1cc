"""What a benchmark says on the two questions of issue 5, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from book import Book
from summary import Line, Method, Tuning, sign

ASKED = 5.0
"""Points that the best weights-only method should gain over tuned task arithmetic."""


@dataclass(frozen=True)
class Verdict:
    """The method that was chosen to answer one question, and its gain."""

    question: str
    asked: float
    """The gain that is asked for, in points (of perplexities: % lower)."""
    method: str
    line: Line
    over: str
    tuning: Tuning
    among: int
    """Methods that it was chosen from."""

    @property
    def answer(self) -> str:
        """Return yes where the whole interval is above what is asked for, no where it is below."""
        value, low, high = self.line.over[self.over]
        if low >= self.asked:
            return "Yes"
        if high < self.asked:
            return "No"
        return "Yes by the mean, not by the whole interval" if value >= self.asked else "Not shown"

    def as_data(self) -> dict[str, Any]:
        """Return what stands in quality.json."""
        value, low, high = self.line.over[self.over]
        ends = self.line.over_seeds[self.over]
        return {
            "question": self.question, "asked": self.asked, "answer": self.answer,
            "method": self.method, "tuned": self.tuning, "over": self.over,
            "seeds": len(self.line.seeds), "gain": value, "low": low, "high": high,
            "seed_low": ends[0], "seed_high": ends[1], "mean": self.line.mean,
        }  # fmt: skip


def finished(found: Sequence[Method]) -> list[Method]:
    """Return the methods with all seeds that any method has: only these compare like with like."""
    most = max((len(method.lines["labels"].seeds) for method in found), default=0)
    return [method for method in found if len(method.lines["labels"].seeds) == most]


def of_first_seed(book: Book) -> Book:
    """Return the rows of the smallest seed alone, which has the most methods."""
    first, alone = min(row["seed"] for row in book.rows.values()), copy(book)
    alone.rows = {key: row for key, row in book.rows.items() if row["seed"] == first}
    return alone


def verdicts(book: Book, found: Sequence[Method]) -> list[Verdict]:
    """Return the answers. A method is chosen by what its tuning sees, never by the test.

    Of weights alone: the best validation score. Without labels: the smallest KL to the experts on
    the unlabelled inputs, which chose the setting too.
    """
    better, answers = sign(book), list[Verdict]()
    rivals = [m for m in finished(found) if m.name != "task_arithmetic"]
    weights = [m for m in rivals if m.data == "weights"]
    few = [m for m in rivals if m.data != "labelled" and "unlabelled" in m.lines]
    if weights:
        best = max(weights, key=lambda m: better * m.lines["labels"].validation)
        much = "5 points" if better > 0 else "5 % of its perplexity"
        asked = f"Does the best weights-only method beat tuned task arithmetic by {much} or more?"
        line = best.lines["labels"]
        over = "task_arithmetic"
        answers.append(Verdict(asked, ASKED, best.name, line, over, "labels", len(weights)))
    if few:
        best = min(few, key=lambda m: kl_of(book, m.name))
        asked = "Does the best method with 16 unlabelled inputs a task beat the uniform ensemble?"
        line = best.lines["unlabelled"]
        answers.append(Verdict(asked, 0.0, best.name, line, "ensemble", "unlabelled", len(few)))
    return [verdict for verdict in answers if verdict.over in verdict.line.over]


def kl_of(book: Book, name: str) -> float:
    """Return a method's smallest KL to the experts on the unlabelled inputs, mean over seeds."""
    found: dict[int, float] = {}
    for row in book.rows.values():
        if row["kind"] == "candidate" and row["method"] == name and "error" not in row:
            found[row["seed"]] = min(row["kl_routed"], found.get(row["seed"], float("inf")))
    return float(np.mean(list(found.values())))


def told(verdict: Verdict) -> str:
    """Return an answer as a line of the page."""
    value, low, high = verdict.line.over[verdict.over]
    ends, seeds = verdict.line.over_seeds[verdict.over], len(verdict.line.seeds)
    how = "validation score" if verdict.tuning == "labels" else "KL on the unlabelled inputs"
    over = {"task_arithmetic": "tuned task arithmetic", "ensemble": "the uniform ensemble"}
    spread = f", {ends[0]:+.1f} to {ends[1]:+.1f} over {seeds} seeds" if seeds > 1 else ", one seed"
    gain = f"{value:+.1f} [{low:+.1f}, {high:+.1f}] over {over[verdict.over]}{spread}"
    return (
        f"- {verdict.question} **{verdict.answer}**: `{verdict.method}` (the best of "
        f"{verdict.among} by {how}) has {verdict.line.mean:.1f}, {gain}."
    )
