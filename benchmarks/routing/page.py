"""Print the tables of docs/benchmarks/routing.md and write its figures beside it, routing.json.

python benchmarks/routing/page.py benchmarks/routing/vision.csv [JSON]
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "routing.json"
NAMES = {"written_s": "cpu_s_to_write", "ms_an_image": "cpu_ms_an_image"}
"""Columns that are called otherwise in the JSON."""


def as_data(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return the figures: accuracies in %, shares from 0 to 1; what a model has not is left out."""
    tasks = list(rows[0])[2:10]
    models: list[dict[str, Any]] = []
    for row in rows:
        accuracy = {key: round(100 * float(row[key]), 1) for key in ("mean", *tasks)}
        others = {
            NAMES.get(key, key): float(value)
            for key, value in row.items()
            if value and key not in ("model", "mean", *tasks)
        }
        models.append(
            {"name": row["model"], "router": bool(row["passes"]), "accuracy": accuracy, **others}
        )
    return {"version": 1, "tasks": tasks, "seeds": 1, "models": models}


def main() -> None:
    with Path(sys.argv[1]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else OUT
    out.write_text(json.dumps(as_data(rows), indent=1) + "\n", encoding="utf-8")
    tasks = list(rows[0])[2:10]

    def number(text: str, scale: float, form: str) -> str:
        return format(scale * float(text), form) if text else "–"

    print("| model | mean | " + " | ".join(tasks) + " | CPU ms an image |")
    print("|---|---|" + "---|" * len(tasks) + "---|")
    for row in rows:
        cells = [number(row[key], 100, ".1f") for key in ("mean", *tasks)]
        print(f"| {row['model']} | {' | '.join(cells)} | {number(row['ms_an_image'], 1, '.1f')} |")
    print(
        "\n| router | numbers held besides, of the model's | file, MB | s to write | passes "
        "| multiply-adds added a pass | own expert chosen | experts chosen |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in (row for row in rows if row["passes"]):
        cells = [
            number(row["parameters"], 1, ".2f"), number(row["file_mb"], 1, ".1f"),
            number(row["written_s"], 1, ".1f"), row["passes"], number(row["added"], 1, ".2f"),
            number(row["holds_own"], 100, ".0f"), number(row["chosen"], 1, ".2f"),
        ]  # fmt: skip
        print(f"| {row['model']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
