"""Write docs/studies/fine_tuning.md from fine_tuning.json, which `fine_tuning.py` makes.

python benchmarks/atlas/fine_tuning_page.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STUDIES = Path(__file__).parents[2] / "docs" / "studies"


def page(told: Mapping[str, Any]) -> str:
    """Return the page: what was found first, then the table, then how."""
    text = list(told["text"])
    begins = next(i for i, line in enumerate(text) if line.startswith("Merges above plain's"))
    columns = ["way", "own accuracy", "distance", *told["columns"]]
    lines = [
        "# Do L2-SP, SAM or weight-scope alignment give experts that merge better?", "",
        *_paragraphs(text[begins:]),
        "Distance is that from the base, relative to the base's norm. Brackets are the least and "
        "the largest of the seeds, not confidence intervals.", "",
        f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in told["table"]), "",
        "## How", "", *text[:begins],
        "What the bound behind `mergewell advise` says beside measured merges: "
        "[advice](advice.md). How to use the three: [fine-tuning](../guides/fine_tuning.md).", "",
        "Figures: `fine_tuning.json`; this page is made of it by "
        "`python benchmarks/atlas/fine_tuning_page.py`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _paragraphs(sentences: list[str]) -> list[str]:
    """Return what was found, each finding a paragraph of its own."""
    found = [line for line in sentences if line.startswith("Merges ")]
    rest = " ".join(line for line in sentences if not line.startswith("Merges "))
    return [part for line in [*found, rest] for part in (line, "")]


def main() -> None:
    """Write the page."""
    told = json.loads((STUDIES / "fine_tuning.json").read_text(encoding="utf-8"))
    (STUDIES / "fine_tuning.md").write_text(page(told), encoding="utf-8")


if __name__ == "__main__":
    main()
