"""Print the tables of docs/benchmarks/routing.md from benchmarks/routing/vision.csv.

python benchmarks/routing/page.py benchmarks/routing/vision.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def main() -> None:
    with Path(sys.argv[1]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
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
