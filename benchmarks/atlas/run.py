"""The atlas: measured merges of real experts, with every predictor beside what was measured.

    python benchmarks/atlas/run.py --data DATA FAMILY [--minutes M] [--sets N] [--only experts]
    python benchmarks/atlas/table.py            (rows into results/*.csv.gz, and correlations)

FAMILY is small_cnn, efficientnet or minilm. Experts are trained when a set may want them, sets are
measured with bases in turn. Each finished row is appended to CACHE/FAMILY/*.jsonl and never made
twice, nor are rows of `results/`; a killed run goes on where it was. All is drawn by number with
explicit seeds: any part can be made by anyone. Weights are not kept in the repository.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

import torch
from book import Book
from experts import Experts
from family import Family
from measure import Atlas
from table import EXPERT, MERGE, known

FAMILIES = {
    "small_cnn": "SmallCnnFamily", "efficientnet": "EfficientNetFamily", "minilm": "MiniLmFamily",
}  # fmt: skip


def main() -> None:
    """Make experts and measure merges until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--sets", type=int, default=200, help="sets a base")
    parser.add_argument("--only", choices=["experts"])
    parser.add_argument("--cache", type=Path, default=cache_folder())
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["MERGEWELL_WORKERS"] = "1"
    until = time.monotonic() + 60 * given.minutes
    family = make_family(given.family, given.data, given.cache)
    rows = family.folder / "experts.jsonl"
    experts = Experts(family, Book(rows, EXPERT, known("experts", given.family)))
    if given.only == "experts":
        experts.make(until)
        return
    first = family.draws().first
    experts.make(until, below=first)
    book = Book(family.folder / "merges.jsonl", MERGE, known("merges", given.family))
    atlas = Atlas(family, experts, book)
    for number in range(given.sets):
        experts.make(until, below=first + number)
        for base in family.bases:
            for row in atlas.measure(base, number, until):
                what = row.get("error") or [round(a, 2) for a in row["merged"]]
                print(base, number, row["method"], what, file=sys.stderr, flush=True)
            if time.monotonic() > until:
                return


def make_family(name: str, data: Path, cache: Path) -> Family:
    """Return a family by its name."""
    return getattr(importlib.import_module(name), FAMILIES[name])(data, cache)


def cache_folder() -> Path:
    """Return where weights and rows are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mergewell" / "atlas"


if __name__ == "__main__":
    main()
