"""Make docs/benchmarks/quality.md, quality.json and the pictures from the rows in results/.

python benchmarks/quality/page.py --out docs/benchmarks
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from book import Book, Row, rounded
from picture import draw
from spaces import BUDGET, LEFT_OUT
from summary import Line, Method, failures, methods, references, sign
from verdict import Verdict, finished, of_first_seed, told, verdicts

from mergewell.learners.base import LEARNERS
from mergewell.methods.base import METHODS

RESULTS = Path(__file__).parent / "results"
ABOUT = Path(__file__).parent / "page.head.md"
TITLES = {
    "vision": "EfficientNet-Lite0, 8 image tasks",
    "text": "MiniLM, 8 text tasks",
    "language": "SmolLM2-135M, 4 domains",
}
DATA = {"weights": "weights", "unlabelled": "unlabelled inputs", "labelled": "labels"}


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    books = {name: Book(given.results / f"{name}.jsonl") for name in TITLES}
    parts: list[str] = []
    short: list[str] = []
    data: list[dict[str, Any]] = []
    for name, book in books.items():
        if not references(book):
            parts += [f"## {TITLES[name]}", "", "**Not run yet.**", ""]
            continue
        found = methods(book)
        answers = verdicts(book, found)
        short += [f"**{TITLES[name]}**", "", *map(told, answers), ""]
        if others := answers_of_first_seed(book, found):
            short += [f"Of the first seed alone, where {len(found)} methods ran:", ""]
            short += [*map(told, others), ""]
        parts += section(name, book, found)
        data.append(as_data(name, book, found))
        compared = {n: mean_of(rows) for n, rows in references(book).items() if n in COMPARED}
        out = given.out / f"quality_{name}.svg"
        draw(out, TITLES[name], found, compared, better=sign(book))
    head = ABOUT.read_text(encoding="utf-8").replace("{BUDGET}", str(BUDGET))
    given.out.mkdir(parents=True, exist_ok=True)
    before, mark, after = head.rstrip().partition("{ANSWERS}")
    head = before + "\n".join(short).rstrip() + after if mark else before
    text = "\n".join([head, "", *parts]).rstrip() + "\n"
    (given.out / "quality.md").write_text(text, encoding="utf-8")
    content = {"version": 1, "benchmarks": rounded(data)}
    (given.out / "quality.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def answers_of_first_seed(book: Book, found: list[Method]) -> list[Verdict]:
    """Return the answers of the first seed, none where every method has every seed."""
    if len(finished(found)) == len(found):
        return []
    alone = of_first_seed(book)
    return verdicts(alone, methods(alone))


COMPARED = ("base", "ensemble", "experts")


def section(name: str, book: Book, found: list[Method]) -> list[str]:
    """Return the part of the page on one benchmark."""
    perplexity = sign(book) < 0
    seeds = sorted({row["seed"] for row in book.rows.values()})
    known = references(book)
    unit = "perplexity, lower is better" if perplexity else "accuracy in %"
    lines = [
        f"## {TITLES[name]}", "",
        f"Mean over tasks, {unit}; seeds with rows: {', '.join(map(str, seeds))}. "
        f"{'; '.join(reference(n, known[n]) for n in COMPARED)}.", "",
        f"![{TITLES[name]}](quality_{name}.svg)", "",
        "Most seeds first, then by the validation score, which chose; gains are over "
        f"task arithmetic tuned with labels{' (% lower)' if perplexity else ' (points)'}.", "",
        "| method | needs | seeds | tuned with labels | seeds' range | worst task (kept) | gain "
        "| tuned without labels | gain | over the ensemble | setting of the first seed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for method in found:
        lines.append(f"| {' | '.join(cells(method))} |")
    lines += beside_public(book)
    failed = {**{n: f"left out: {why}" for n, why in LEFT_OUT.items()}, **failures(book)}
    waiting = [n for n in (*METHODS.names(), *LEARNERS.names()) if n not in failed]
    waiting = [n for n in waiting if n not in {method.name for method in found}]
    if waiting:
        lines += ["", f"**Not run yet**: {', '.join(f'`{n}`' for n in waiting)}."]
    lines += ["", "Not in the table: " + "; ".join(f"`{n}` ({w})" for n, w in failed.items()), ""]
    lines += ["By task, in the tasks' order "
              f"({', '.join(known['base'][0]['tasks'])}), mean over the seeds:", ""]  # fmt: skip
    for one in COMPARED:
        tasks = [np.mean([row["tasks"][t] for row in known[one]]) for t in known[one][0]["tasks"]]
        lines.append(f"- {one}: {', '.join(f'{value:.1f}' for value in tasks)}")
    return [*lines, ""]


def beside_public(book: Book) -> list[str]:
    """Return the table of public implementations beside ours, in the settings of ours."""
    rows = [row for row in book.rows.values() if row["kind"] == "public"]
    if not rows:
        return []
    lines = [
        "", f"**Public implementations** ({rows[0]['source']}), on the same experts in the setting "
        "of the line above, as their classes come; their merged task vector less ours, relative to "
        "ours, over two-dimensional tensors and over the others (`public.py`):", "",
        "| method | seed | ours | public | matrices apart | others apart | merging: ours, CPU s "
        "| public, CPU s |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        ours = book.known({**row, "kind": "test"})
        if "error" in row or ours is None:
            why = row.get("error", "ours has not been run in this setting")
            lines.append(f"| `{row['method']}` | {row['seed']} | – | {why} | | | | |")
            continue
        tried = book.rows.values()
        seconds = [
            r["merge_s"]
            for r in tried
            if r["kind"] == "candidate" and r["method"] == row["method"] and "merge_s" in r
        ]
        cells = [
            f"`{row['method']}`", str(row["seed"]), f"{ours['mean']:.1f}", f"{row['mean']:.1f}",
            f"{row['apart']['matrices']:.1e}", f"{row['apart']['others']:.1e}",
            f"{max(seconds):.1f}", f"{row['merge_s']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def reference(name: str, rows: list[Row]) -> str:
    """Return a reference model in words."""
    words = {"experts": "each expert on its own task", "ensemble": "uniform logit ensemble"}
    worst = min(rows, key=lambda row: row["worst_kept"])
    note = "" if name == "experts" else f", worst {worst['worst_task']} {worst['worst']:.1f}"
    return f"{words.get(name, name)} **{mean_of(rows):.1f}**{note}"


def mean_of(rows: list[Row]) -> float:
    """Return the mean over seeds."""
    return float(np.mean([row["mean"] for row in rows]))


def cells(method: Method) -> list[str]:
    """Return a row of the table."""
    line, other = method.lines["labels"], method.lines.get("unlabelled")
    seeds = len(line.seeds)
    return [
        f"`{method.name}`", DATA[method.data], str(seeds), value_of(line),
        f"{line.spread[0]:.1f} to {line.spread[1]:.1f}" if seeds > 1 else "–",
        f"{line.worst_task} {line.worst:.1f} ({100 * line.worst_kept:.0f} %)",
        gain_of(line, "task_arithmetic"),
        value_of(other) if other else "–",
        gain_of(other, "task_arithmetic") if other else "–",
        gain_of(other, "ensemble") if other else "–",
        line.settings[0],
    ]  # fmt: skip


def value_of(line: Line) -> str:
    """Return a mean with its interval."""
    return f"{line.mean:.1f} [{line.low:.1f}, {line.high:.1f}]"


def gain_of(line: Line, name: str) -> str:
    """Return a gain with its interval."""
    if name not in line.over:
        return "–"
    value, low, high = line.over[name]
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def as_data(name: str, book: Book, found: list[Method]) -> dict[str, Any]:
    """Return what quality.json says of one benchmark."""
    known: Mapping[str, list[Row]] = references(book)
    return {
        "name": name, "title": TITLES[name], "tasks": list(known["base"][0]["tasks"]),
        "metric": "perplexity" if sign(book) < 0 else "accuracy",
        **{n: mean_of(known[n]) for n in COMPARED},
        "methods": [
            {
                "name": m.name, "data": m.data, **m.lines["labels"].as_data(),
                "without_labels": m.lines["unlabelled"].as_data() if "unlabelled" in m.lines
                else None,
                "merge_cpu_s": m.merge_s,
            }
            for m in found
        ],
        "answers": [answer.as_data() for answer in verdicts(book, found)],
        "answers_of_first_seed": [
            answer.as_data() for answer in answers_of_first_seed(book, found)
        ],
        "failed": failures(book),
    }  # fmt: skip


if __name__ == "__main__":
    main()
