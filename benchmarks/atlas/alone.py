"""What each expert's own task tells of it: predictors that need no merge, looked at once.

    python benchmarks/atlas/alone.py FAMILY --data DATA

A row for each base and expert that are in a set together, in CACHE/FAMILY/alone.jsonl; `table.py`
puts them into `alone.FAMILY.csv.gz`, from where `evidence.py` joins them to the merges' rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from book import Book, Row
from experts import Experts
from family import State, read_state
from run import cache_folder, make_family
from seen import Eye
from table import EXPERT, MERGE, PAIR, known

from mergewell.prediction.alone import alone, beyond
from mergewell.prediction.look import Seen, look


def main() -> None:
    """Look at what was not looked at yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    given = parser.parse_args()
    torch.set_num_threads(1)
    family = make_family(given.family, given.data, given.cache)
    rows = Book(family.folder / "experts.jsonl", EXPERT, known("experts", given.family))
    experts, eye = Experts(family, rows), Eye(family)
    book = Book(family.folder / "alone.jsonl", PAIR, known("alone", given.family))
    merges = Book(family.folder / "merges.jsonl", MERGE, known("merges", given.family))
    for base, name in pairs(merges):
        key: Row = {"family": given.family, "base": base, "expert": name}
        if book.has(key):
            continue
        expert = experts.all[name]
        inputs, head = family.inputs(expert.task), family.head(expert.base, expert.task)

        def seen(state: State, inputs=inputs) -> Seen:
            return look(eye.merged(state).module, inputs.batches)

        below, state = read_state(family.base_path(base)), experts.state(name)
        start, own, further = seen(below), seen(state), seen(beyond(below, state))
        said, more = (family.logits(torch.cat(s.outputs), head) for s in (own, further))
        features = (start.last, own.last, further.last)
        book.add({**key, **alone(*features, said=said, said_further=more)})


def pairs(merges: Book) -> Iterator[tuple[str, str]]:
    """Yield each base and expert of a set."""
    found = ((row["base"], name) for row in merges.rows.values() for name in row["experts"])
    yield from dict.fromkeys(found)


if __name__ == "__main__":
    main()
