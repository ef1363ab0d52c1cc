"""Predictors of merges that were measured before a predictor was there.

    python benchmarks/atlas/again.py FAMILY --data DATA [--minutes M]

Each merge of the rows in the cache is made again, which gives the same weights, and looked at by
the predictors of weights and unlabelled inputs (`lie`, `answers`); nothing is judged again. The
rows stand in CACHE/FAMILY/again.jsonl; `table.py` puts both together.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from book import Book, Row
from experts import Expert, Experts
from measure import Atlas, Place
from merges import ExpertSet, Merge, recipe
from predictors import by_inputs, by_weights, spreads
from run import cache_folder, make_family
from table import EXPERT, MERGE, known

from mergewell.plan import make_plan
from mergewell.prediction.look import look
from mergewell.run import merge_tensors

NEW = "u_cka_said"
"""A predictor that tells rows with all of them from older ones."""


class Again(Place):
    """A set of which only what the models answer is known."""

    def __init__(self, atlas: Atlas, of: ExpertSet) -> None:
        """Take what each model makes of the inputs; nothing is tested."""
        self.atlas, self.of, self.family = atlas, of, atlas.of
        self.open()

    def seen_again(self, merge: Merge) -> Row:
        """Return the predictors of one merge."""
        family = self.family
        plan = make_plan(
            recipe(family, self.atlas.experts, self.of, merge, self.calibration(merge))
        )
        state = {**self.base, **{n: t.float() for n, t in merge_tensors(plan)}}
        module = self.atlas.eye.merged(state).module
        mine = [look(module, family.inputs(task).batches) for task in self.tasks]
        numbers, each = by_weights(self.base, self.states, state, {})
        more, by_expert = by_inputs(family, self.heads, self.seen, mine)
        each |= by_expert
        return {"predictors": numbers | more | spreads(each), "each": each}


def main() -> None:
    """Look again until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    given = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * given.minutes
    family = make_family(given.family, given.data, given.cache)
    experts = Experts(
        family, Book(family.folder / "experts.jsonl", EXPERT, known("experts", given.family))
    )
    rows = Book(family.folder / "merges.jsonl", MERGE, known("merges", given.family)).rows
    atlas = Atlas(family, experts, Book(Path("/nonexistent"), MERGE))
    again = Book(family.folder / "again.jsonl", MERGE)
    place: Again | None = None
    for row in rows.values():
        if time.monotonic() > until:
            return
        if "error" in row or again.has(row) or NEW in row.get("each", {}):
            continue
        of = _set(row, experts)
        if place is None or (place.of.base, place.of.number) != (of.base, of.number):
            place = Again(atlas, of)
        again.add({**{key: row[key] for key in MERGE}, **place.seen_again(_merge(row))})


def _set(row: Mapping[str, Any], experts: Experts) -> ExpertSet:
    found: Sequence[Expert] = tuple(experts.all[name] for name in row["experts"])
    return ExpertSet(row["base"], row["set"], tuple(found), row.get("reason") or "")


def _merge(row: Mapping[str, Any]) -> Merge:
    return Merge(
        row["merge"], row["method"], row["parameters"], tuple(row["coefficients"]), row["seed"]
    )


if __name__ == "__main__":
    main()
