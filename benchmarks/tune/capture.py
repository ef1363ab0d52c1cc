"""What every candidate says on inputs and tests, captured once: any objective is tried on it later.

    python benchmarks/tune/capture.py small_cnn --data DATA [--minutes M] [--sets N]

Sets are drawn by number: odd ones of the tasks that objectives are developed on, even ones of the
others, which no choice was made on. A set's file is written whole and never made again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "atlas"))
from book import Book
from experts import Expert, Experts
from family import Family, Part, Runner
from run import FAMILIES, cache_folder, make_family
from table import EXPERT, known

from mergewell.models.barrier import first_output
from mergewell.recipe import make_recipe
from mergewell.tune.search import merged
from mergewell.tune.space import Candidate, candidates

METHODS = ("average", "task_arithmetic", "ties", "dare", "tsv", "iso_c")
BUDGET, INPUTS = 10, 64
SIZES = (2, 2, 3, 3, 4, 5)
DEFAULT = Candidate("task_arithmetic", {}, 0.3)


def split(family: Family) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tasks that objectives are developed on, and those that are reported."""
    order = np.random.default_rng(71).permutation(len(family.tasks))
    cut = -(-7 * len(order) // 12)
    names = [family.tasks[i] for i in order]
    return tuple(names[:cut]), tuple(names[cut:])


def drawn(family: Family, there: list[Expert], number: int) -> list[Expert]:
    """Return the experts of a set: one base, different tasks, as they were trained."""
    rng = np.random.default_rng([73, number])
    base = family.bases[number // 2 % len(family.bases)]
    tasks = split(family)[1 - number % 2]
    sound = [
        e for e in there if e.base == base and e.kind in ("given", "trained") and e.task in tasks
    ]
    size = min(int(rng.choice(SIZES)), len({e.task for e in sound}))
    found: list[Expert] = []
    for place in rng.permutation(len(sound)):
        if len(found) < size and all(sound[place].task != other.task for other in found):
            found.append(sound[place])
    return found


def tried(number: int) -> list[Candidate]:
    """Return the candidates of a set: those of `mergewell tune`, and the default beside them."""
    given = candidates(METHODS, budget=BUDGET, seed=number)
    return given if DEFAULT in given else [*given, DEFAULT]


def more_inputs(family: Family, task: str) -> Part:
    """Return 64 training examples, of which the first 16 no expert trained here has seen."""
    module = sys.modules[type(family).__module__]
    shown, module.SHOWN = module.SHOWN, INPUTS
    try:
        return type(family).inputs(family, task)
    finally:
        module.SHOWN = shown


class Capture:
    """Captures the sets of one family."""

    def __init__(self, family: Family, experts: Experts) -> None:
        self.of, self.experts = family, experts
        self.runner = Runner(family)
        self.shown = {task: more_inputs(family, task) for task in family.tasks}

    def set_(self, chosen: list[Expert], number: int) -> dict[str, np.ndarray]:
        """Return arrays: what candidates and experts say, and which tests they get right."""
        family, tasks = self.of, [e.task for e in chosen]
        heads = [family.head(e.base, e.task) for e in chosen]
        found: dict[str, Any] = {}

        def logits(module: torch.nn.Module, j: int, part: Part) -> torch.Tensor:
            with torch.inference_mode():
                outputs = [first_output(module, batch).float() for batch in part.batches]
            return family.logits(torch.cat(outputs), heads[j])

        def right(module: torch.nn.Module, j: int) -> np.ndarray:
            part = family.test(tasks[j])
            return (logits(module, j, part).argmax(-1) == torch.cat(list(part.labels))).numpy()

        shown = [self.shown[task] for task in tasks]
        for k, expert in enumerate(chosen):
            module = self.runner.put(self.experts.state(expert.name))
            for j in range(len(chosen)):
                found[f"expert.{k}.{j}"] = logits(module, j, shown[j]).numpy()
            found[f"own.{k}"] = right(module, k)
        recipe = make_recipe(
            {
                "base": str(family.base_path(chosen[0].base)),
                "experts": [{"path": str(self.experts.path(e.name))} for e in chosen],
                "rules": list(family.rules),
            }
        )
        for place, module in merged(recipe, tried(number), family.factory):
            module.eval()
            for j in range(len(chosen)):
                found[f"said.{place}.{j}"] = logits(module, j, shown[j]).numpy()
                found[f"right.{place}.{j}"] = right(module, j)
        return found


def main() -> None:
    """Capture set after set until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--sets", type=int, default=150)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["MERGEWELL_WORKERS"] = "1"
    until = time.monotonic() + 60 * given.minutes
    family = make_family(given.family, given.data, given.cache)
    book = Book(family.folder / "experts.jsonl", EXPERT, known("experts", given.family))
    experts = Experts(family, book)
    there = experts.there()
    out = given.cache.parent / "tune" / given.family
    out.mkdir(parents=True, exist_ok=True)
    capture = Capture(family, experts)
    for number in range(given.sets):
        path, chosen = out / f"{number}.npz", drawn(family, there, number)
        if path.exists() or len(chosen) < 2:
            continue
        if time.monotonic() > until:
            return
        began = time.process_time()
        arrays = capture.set_(chosen, number)
        arrays["experts"] = np.array([e.name for e in chosen])
        arrays["tasks"] = np.array([e.task for e in chosen])
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **arrays)
        part.rename(path)
        spent = time.process_time() - began
        print(f"{number} {len(chosen)} experts {spent:.1f} CPU s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
