"""Make docs/studies/neulig.md and neulig.json of the rows that `study.py` has made.

python benchmarks/neulig/page.py
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "docs" / "studies" / "neulig.md"
TITLES = {
    "cnn": "EfficientNet-Lite0 (gtsrb, cifar10, mnist, fashion_mnist, kannada)",
    "transformer": "MiniLM (trec, agnews, banking77, snips, sst2)",
    "diverse": "Diverse origin: small CNNs from five random beginnings "
    "(mnist, fashion_mnist, kannada, usps, notmnist)",
}
AIMS = {"labels": "labels (sup)", "entropy": "entropy (semi)", "expert": "own expert (ours)"}
MODES = ("batch", "batch_mean", "task", "global", "static")
Row = dict[str, str]


def main() -> None:
    """Write the page."""
    with (HERE / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    parts = [HERE.joinpath("head.md").read_text(encoding="utf-8").rstrip()]
    data: list[dict[str, Any]] = []
    for family, title in TITLES.items():
        mine = [row for row in rows if row["family"] == family]
        if mine:
            parts.append(f"## {title}\n\n{controls(mine)}\n\n{table(mine)}")
            data.append({"name": family, "title": title, "rows": rounded(figures(mine))})
    OUT.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    content = {"version": 1, "families": data}
    OUT.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def controls(rows: Sequence[Row]) -> str:
    """Return what the experts and the uniform average give."""
    own = [100 * float(row["merged"]) for row in rows if row["mode"] == "own expert"]
    even = [row for row in rows if row["mode"] == "uniform"]
    merged, together = (mean([100 * float(row[key]) for row in even]) for key in KEYS)
    return (
        f"Each expert on its own task {mean(own):.1f} %; uniform average {merged:.1f} %, uniform "
        f"ensemble of features {together:.1f} %."
    )


KEYS = ("merged", "ensemble")


def figures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return means over tasks by inputs, aim and mode: one number a seed."""
    groups: dict[tuple[int, str, str], dict[str, list[Row]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        if row["aim"] in AIMS:
            groups[int(row["inputs"]), row["aim"], row["mode"]][row["seed"]].append(row)
    found: list[dict[str, Any]] = []
    for key in sorted(groups, key=lambda k: (k[0], list(AIMS).index(k[1]), MODES.index(k[2]))):
        seeds = list(groups[key].values())
        every = [row for seed in seeds for row in seed]
        merged, together = (
            [mean([100 * float(row[name]) for row in seed]) for seed in seeds] for name in KEYS
        )
        found.append(
            {
                **dict(zip(("inputs", "aim", "mode"), key, strict=True)),
                "merged": merged, "ensemble": together,
                "gap": [b - a for a, b in zip(merged, together, strict=True)],
                "disagree": mean([100 * float(row["disagreement"]) for row in every]),
                "entropy": mean([float(row["entropy"]) for row in every]),
                "passes": int(every[0]["passes"]),
            }
        )  # fmt: skip
    return found


def table(rows: Sequence[Row]) -> str:
    """Return a table of means over tasks, with the range over seeds."""
    lines = [
        "| inputs a task | learned from | mode | merged % | ensemble % | gap, points "
        "| disagree % | entropy of log K | passes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in figures(rows):
        cells = [
            str(one["inputs"]), AIMS[one["aim"]], one["mode"],
            *(spread(one[name]) for name in ("merged", "ensemble", "gap")),
            f"{one['disagree']:.1f}", f"{one['entropy']:.2f}", str(one["passes"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def rounded(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with their numbers to three decimals."""
    return [
        {
            name: [round(v, 3) for v in value]
            if isinstance(value, list)
            else round(value, 3)
            if isinstance(value, float)
            else value
            for name, value in row.items()
        }
        for row in rows
    ]


def spread(values: Sequence[float]) -> str:
    """Return a mean with the range over seeds."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


if __name__ == "__main__":
    main()
