"""Choosing partners, tried: do pairs foretell groups, does a greedy search help, does the law hold?

    python benchmarks/atlas/partners.py --data DATA [--sets 30] [--seed 0]

Sets of six experts of the small CNN, each of another task, drawn with a seed; every group's average
is measured on the tests and on 16 unlabelled inputs a task. Writes docs/studies/partners.json, from
which `partners_page.py` makes the page. Ten minutes on one core; the experts are the atlas' own.

Shapes: K = 6 experts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from book import Book
from experts import Expert, Experts
from family import Family, Part, Runner, State, read_state
from run import cache_folder, make_family
from table import EXPERT, known, spearman
from torch import Tensor

from mergewell.partners.greedy import greedy
from mergewell.partners.groups import best_groups, foretold
from mergewell.partners.law import fit_law
from mergewell.partners.measure import correlation

COUNT = 6
OUT = Path(__file__).parents[2] / "docs/studies/partners.json"
SEED = 909

Group = tuple[int, ...]


class Six:
    """Six experts, and what averages of them give."""

    def __init__(self, family: Family, runner: Runner, chosen: Sequence[Expert], book: Experts):
        self.of, self.runner = family, runner
        self.tasks = [one.task for one in chosen]
        self.heads = [family.head(one.base, one.task) for one in chosen]
        self.base = read_state(family.base_path(chosen[0].base))
        self.states = [book.state(one.name) for one in chosen]
        self.answers = [torch.cat(list(family.test(task).labels)) for task in self.tasks]
        self.known: dict[tuple[float, ...], tuple[np.ndarray, np.ndarray]] = {}
        alone = [self._answers(state) for state in self.states]
        self.own = np.array([_share(alone[k][0][k], self.answers[k]) for k in range(COUNT)])
        self.said = [alone[k][1][k] for k in range(COUNT)]

    def kept(self, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Return retention on tests and answers kept on unlabelled inputs, by task [K] each."""
        key = tuple(weights)
        if key not in self.known:
            tests, inputs = self._answers(_mean(self.states, weights))
            right = [_share(a, b) for a, b in zip(tests, self.answers, strict=True)]
            same = [_share(a, b) for a, b in zip(inputs, self.said, strict=True)]
            self.known[key] = np.array(right) / np.maximum(self.own, 1e-9), np.array(same)
        return self.known[key]

    def group(self, members: Group) -> tuple[float, float]:
        """Return the mean retention and the mean share of answers kept of a group's own tasks."""
        retention, same = self.kept([float(k in members) / len(members) for k in range(COUNT)])
        places = list(members)
        return float(retention[places].mean()), float(same[places].mean())

    def covariance(self) -> np.ndarray:
        """Return the covariance of the task vectors, [K, K]."""
        names = [n for n, t in self.base.items() if t.is_floating_point()]
        vectors = [torch.cat([(s[n] - self.base[n]).flatten() for n in names]) for s in self.states]
        return np.cov(torch.stack(vectors).double().numpy(), bias=True)

    def _answers(self, state: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        self.runner.put(state)
        return self._each(self.of.test), self._each(self.of.inputs)

    def _each(self, part: Any) -> list[Tensor]:
        found: list[Tensor] = []
        for task, head in zip(self.tasks, self.heads, strict=True):
            given: Part = part(task)
            found.append(self.of.logits(self.runner.features(given), head).argmax(-1))
        return found


def _mean(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    return {
        name: sum(w * s[name] for w, s in zip(weights, states, strict=True) if w)  # type: ignore
        for name in states[0]
    }


def _share(one: Tensor, other: Tensor) -> float:
    return float((one == other).double().mean())


def draw(experts: Experts, base: str, number: int) -> list[Expert]:
    """Return six finished experts of one base, each of another task."""
    rng = np.random.default_rng([SEED, int(base[1:]), number])
    there = [e for e in experts.there() if e.base == base and e.kind == "trained"]
    last = {e.run.number: e for e in there if e.step == e.run.steps}
    by_task: dict[str, list[Expert]] = {}
    for one in last.values():
        by_task.setdefault(one.task, []).append(one)
    tasks = rng.permutation(sorted(by_task))[:COUNT]
    return [by_task[str(t)][int(rng.integers(len(by_task[str(t)])))] for t in tasks]


def measured(six: Six) -> dict[str, Any]:
    """Return what one set says of pairs, groups, the greedy search and the scaling law."""
    groups = [g for size in range(2, COUNT + 1) for g in combinations(range(COUNT), size)]
    told = {g: six.group(g) for g in groups}
    covariance = six.covariance()
    pairs = {
        "labelled pairs": _pairs(told, 0), "unlabelled pairs": _pairs(told, 1),
        "kinship": correlation(covariance),
    }  # fmt: skip
    found: dict[str, Any] = {"own": six.own.tolist(), "sizes": {}}
    for size in range(3, COUNT):
        some = [g for g in groups if len(g) == size]
        true = np.array([told[g][0] for g in some])
        row: dict[str, Any] = {"mean": float(true.mean()), "best": float(true.max())}
        for name, table in pairs.items():
            guess = np.array([foretold(table, g) for g in some])
            row[name] = {
                "rho": spearman(guess, true),
                "regret": float(true.max() - true[guess.argmax()]),
            }
        picked = next(g for g in best_groups(pairs["unlabelled pairs"]) if len(g.members) == size)
        row["chosen"] = told[picked.members][0]
        guess = np.array([told[g][1] for g in some])
        row["group itself"] = {
            "rho": spearman(guess, true), "regret": float(true.max() - true[guess.argmax()]),
        }  # fmt: skip
        found["sizes"][size] = row
    everyone = tuple(range(COUNT))
    search = greedy(covariance, lambda w: float(six.kept(w)[1].mean()))
    found["greedy"] = {
        "average": told[everyone][0], "best": float(six.kept(search.best.coefficients)[0].mean()),
        "merges": sum(one.generation > 0 for one in search.tried), "stopped": search.stopped,
        "kept_average": told[everyone][1], "kept_best": search.best.score,
    }  # fmt: skip
    by_size = {s: float(np.mean([told[g][1] for g in groups if len(g) == s])) for s in range(2, 7)}
    law = fit_law([(s, by_size[s]) for s in (2, 3, 4)])
    found["law"] = {"by_size": by_size, "foretold": law(COUNT) if law else None}
    return found


def _pairs(told: Mapping[Group, tuple[float, float]], which: int) -> np.ndarray:
    found = np.full((COUNT, COUNT), np.nan)
    for (i, j), values in ((g, v) for g, v in told.items() if len(g) == 2):
        found[i, j] = found[j, i] = values[which]
    return found


def main() -> None:
    """Measure set after set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", type=int, default=30)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    given = parser.parse_args()
    torch.set_num_threads(1)
    family = make_family("small_cnn", given.data, given.cache)
    rows = Book(family.folder / "experts.jsonl", EXPERT, known("experts", "small_cnn"))
    experts, runner = Experts(family, rows), Runner(family)
    found: list[dict[str, Any]] = []
    for number in range(given.sets):
        base = family.bases[number % len(family.bases)]
        chosen = draw(experts, base, number)
        row = measured(Six(family, runner, chosen, experts))
        found.append({"base": base, "number": number, "experts": [e.name for e in chosen], **row})
        print(number, base, row["sizes"][3], file=sys.stderr, flush=True)
    OUT.write_text(json.dumps({"version": 1, "seed": SEED, "sets": found}) + "\n")


if __name__ == "__main__":
    main()
