"""Make docs/studies/scale.md, .json and .svg of the rows that `study.py` has made.

python benchmarks/scale/page.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curves import Mean, Panel, data_of, draw, mean_of, percents
from study import METHODS, NUMBERS, rows

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "docs" / "studies" / "scale.md"
Row = dict[str, str]


def main() -> None:
    """Write the page."""
    every = rows()
    widths = sorted({float(row["width"]) for row in every})
    seeds = sorted({row["seed"] for row in every})
    sizes = {float(row["width"]): int(row["parameters"]) for row in every}
    names = [f"{sizes[width] / 1000:.0f} k" for width in widths]
    lines: list[str] = []
    data: list[dict[str, Any]] = []
    for count in NUMBERS:
        for width, size in zip(widths, names, strict=True):
            some = [r for r in every if float(r["width"]) == width and int(r["experts"]) == count]
            base, own = over(some, "base", seeds), over(some, "expert", seeds)
            kept = {m: recovered(some, m, seeds) for m in METHODS}
            held = {m: retained(some, m, seeds) for m in METHODS}
            cosine = over(some, "cosine", seeds)
            cells = [percents(kept[m]) for m in METHODS] + [percents(held["task_arithmetic"])]
            lines.append(
                f"| {count} | {size} | {100 * base.value:.1f} | {100 * own.value:.1f} | "
                f"{cosine.value:.2f} | {' | '.join(cells)} |"
            )
            data.append(
                {
                    "experts": count, "width": width, "parameters": sizes[width],
                    "seeds": len(seeds), "base": data_of(base), "expert": data_of(own),
                    "cosine": data_of(cosine),
                    "recovered": {m: data_of(v) for m, v in kept.items()},
                    "retained": {m: data_of(v) for m, v in held.items()},
                }
            )  # fmt: skip
    panels = [
        Panel(
            method, "experts merged", NUMBERS, [str(count) for count in NUMBERS],
            {
                size: [
                    recovered(
                        [r for r in every if float(r["width"]) == w and int(r["experts"]) == c],
                        method, seeds,
                    )
                    for c in NUMBERS
                ]
                for w, size in zip(widths, names, strict=True)
            },
        )
        for method in METHODS
    ]  # fmt: skip
    draw(OUT.with_suffix(".svg"), "Recovered share of the gain by number and size", panels)
    head = (HERE / "head.md").read_text(encoding="utf-8").rstrip()
    table = [
        "| experts | parameters | base | own experts | cosine | "
        + " | ".join(f"{method}: recovered" for method in METHODS)
        + " | task_arithmetic: retention |",
        "|---" * 9 + "|",
        *lines,
    ]
    tests = "\n".join(sentences(every, widths, seeds))
    OUT.write_text(f"{head}\n\n## In numbers\n{tests}\n\n" + "\n".join(table) + "\n", "utf-8")
    OUT.with_suffix(".json").write_text(json.dumps({"version": 1, "rows": data}, indent=1) + "\n")


def sentences(every: Sequence[Row], widths: Sequence[float], seeds: Sequence[str]) -> list[str]:
    """Return what size and number change, each with an interval of paired differences."""
    made: list[str] = []
    for method in METHODS:
        found = {
            (w, c, s): recovered_of(
                [
                    r
                    for r in every
                    if (float(r["width"]), int(r["experts"]), r["seed"]) == (w, c, s)
                ],
                method,
            )
            for w in widths
            for c in NUMBERS
            for s in seeds
        }
        size = mean_of(
            [
                sum(found[widths[-1], c, s] - found[widths[0], c, s] for c in NUMBERS) / 3
                for s in seeds
            ]
        )
        number = mean_of(
            [sum(found[w, 8, s] - found[w, 2, s] for w in widths) / len(widths) for s in seeds]
        )
        made.append(
            f"- {method}: the largest size less the smallest {points(size)} points of what is "
            f"recovered; 8 experts less 2 {points(number)} points."
        )
    return made


def points(mean: Mean) -> str:
    """Return a difference of fractions in points."""
    return f"{100 * mean.value:+.1f} ({100 * mean.low:+.1f} to {100 * mean.high:+.1f})"


def over(some: Sequence[Row], field: str, seeds: Sequence[str]) -> Mean:
    """Return the mean of a field over tasks, seed by seed."""
    one = [row for row in some if row["method"] == "average"]
    return mean_of([average([float(r[field]) for r in one if r["seed"] == s]) for s in seeds])


def recovered(some: Sequence[Row], method: str, seeds: Sequence[str]) -> Mean:
    """Return the share of the experts' gain over the base that a merge keeps."""
    return mean_of([recovered_of([r for r in some if r["seed"] == s], method) for s in seeds])


def recovered_of(some: Sequence[Row], method: str) -> float:
    """Return the same of one seed: sums over tasks, so that no small gain is divided by."""
    mine = [row for row in some if row["method"] == method]
    gain = sum(float(row["accuracy"]) - float(row["base"]) for row in mine)
    return gain / sum(float(row["expert"]) - float(row["base"]) for row in mine)


def retained(some: Sequence[Row], method: str, seeds: Sequence[str]) -> Mean:
    """Return merged accuracy over expert accuracy, the mean over tasks."""
    mine = [row for row in some if row["method"] == method]
    return mean_of(
        [
            average([float(r["accuracy"]) / float(r["expert"]) for r in mine if r["seed"] == s])
            for s in seeds
        ]
    )


def average(values: Sequence[float]) -> float:
    """Return a mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
