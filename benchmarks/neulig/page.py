"""Make docs/studies/neulig.md of the rows that `study.py` has made.

python benchmarks/neulig/page.py
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

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
    for family, title in TITLES.items():
        mine = [row for row in rows if row["family"] == family]
        if mine:
            parts.append(f"## {title}\n\n{controls(mine)}\n\n{table(mine)}")
    OUT.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


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


def table(rows: Sequence[Row]) -> str:
    """Return a table of means over tasks, with the range over seeds."""
    groups: dict[tuple[int, str, str], dict[str, list[Row]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        if row["aim"] in AIMS:
            groups[int(row["inputs"]), row["aim"], row["mode"]][row["seed"]].append(row)
    lines = [
        "| inputs a task | learned from | mode | merged % | ensemble % | gap, points "
        "| disagree % | entropy of log K | passes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for inputs, aim, mode in sorted(
        groups, key=lambda key: (key[0], list(AIMS).index(key[1]), MODES.index(key[2]))
    ):
        seeds = groups[inputs, aim, mode].values()
        merged, together = (
            [mean([100 * float(row[key]) for row in seed]) for seed in seeds] for key in KEYS
        )
        gaps = [b - a for a, b in zip(merged, together, strict=True)]
        cells = [
            str(inputs), AIMS[aim], mode, spread(merged), spread(together), spread(gaps),
            f"{mean([100 * float(r['disagreement']) for seed in seeds for r in seed]):.1f}",
            f"{mean([float(r['entropy']) for seed in seeds for r in seed]):.2f}",
            next(r["passes"] for seed in seeds for r in seed),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def spread(values: Sequence[float]) -> str:
    """Return a mean with the range over seeds."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


if __name__ == "__main__":
    main()
