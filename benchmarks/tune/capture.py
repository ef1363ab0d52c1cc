"""What every candidate says on inputs and tests, captured once: any objective is tried on it later.

    python benchmarks/tune/capture.py FAMILY --data DATA [--sets odd|even] [--first N] [--last N]

Sets are drawn by number: odd ones of the tasks that objectives are developed on, even ones of the
others, which no choice was made on. A set's file is written whole and never made again. Inputs are
examples of the test split that are not among the tests, so that no expert was trained on them;
where that is cheap, training examples too, to see what it does to judge by what was learned.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "atlas"))
from book import Book
from experts import Expert, Experts
from family import Family, Part, Runner, read_state
from run import FAMILIES, cache_folder, make_family
from table import EXPERT, known

from mergewell.models.barrier import first_output
from mergewell.recipe import make_recipe
from mergewell.tune.space import Candidate, candidates
from mergewell.tune.trying import merged

METHODS = ("average", "task_arithmetic", "ties", "dare", "tsv", "iso_c")
INPUTS = 64
BUDGET = {"small_cnn": 10, "efficientnet": 4, "minilm": 4}
"""Candidates of each method: a forward pass of the last two costs ten and a hundred times more."""

LEARNED = ("small_cnn",)
"""Families of which training examples are captured too."""
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


def tried(family: str, number: int) -> list[Candidate]:
    """Return the candidates of a set: those of `mergewell tune`, and the default beside them."""
    given = candidates(METHODS, budget=BUDGET[family], seed=number)
    return given if DEFAULT in given else [*given, DEFAULT]


def learned_inputs(family: Family, task: str) -> Part:
    """Return 64 training examples, of which the first 16 no expert trained here has seen."""
    with setting(family, "SHOWN", INPUTS):
        return type(family).inputs(family, task)


def fresh_inputs(family: Family, task: str) -> Part:
    """Return 64 examples behind the tests, which no expert was trained on; the first 16 first."""
    tested = len(torch.cat(list(family.test(task).labels)))
    if family.name == "minilm":
        on_text = sys.modules["on_text"]
        known = on_text.rows(family.data, task, "test")
        order = np.random.default_rng(11).permutation(len(known))[tested : tested + INPUTS]
        parts = [on_text.examples([known[i] for i in some]) for some in (order[:16], order[16:])]
        return Part(
            [one for part in parts for one in part.batches],
            [one for part in parts for one in part.labels],
        )
    with setting(family, "TESTED", tested + INPUTS):
        part = type(family).test(family, task)
    images = torch.cat([batch for batch in part.batches if isinstance(batch, torch.Tensor)])
    return Part([images[tested:]], [torch.cat(list(part.labels))[tested:]])


@contextmanager
def setting(family: Family, name: str, value: int) -> Iterator[None]:
    """Set a constant of a family's file for a while."""
    module = sys.modules[type(family).__module__]
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class Capture:
    """Captures the sets of one family."""

    def __init__(self, family: Family, experts: Experts) -> None:
        self.of, self.experts = family, experts
        self.runner = Runner(family)
        self.inputs = {"fresh": {task: fresh_inputs(family, task) for task in family.tasks}}
        if family.name in LEARNED:
            self.inputs["learned"] = {task: learned_inputs(family, task) for task in family.tasks}

    def set_(self, chosen: list[Expert], number: int) -> dict[str, np.ndarray]:
        """Return what base, experts and candidates say on inputs, and which tests are right.

        Keys: `WHO.INPUTS.TASK`, logits [64, C], and `WHO.right.TASK`, [T]; WHO is base, expertK or
        a candidate's number, INPUTS fresh or learned.
        """
        family = self.of
        heads = [family.head(e.base, e.task) for e in chosen]
        tests = [family.test(e.task) for e in chosen]
        found: dict[str, np.ndarray] = {}

        def logits(module: torch.nn.Module, j: int, part: Part) -> torch.Tensor:
            precise = torch.autocast("cpu", torch.bfloat16, enabled=family.autocast)
            with torch.inference_mode(), precise:
                outputs = [first_output(module, batch) for batch in part.batches]
            return family.logits(torch.cat(outputs).float(), heads[j])

        def look(who: str, module: torch.nn.Module, judged: Sequence[int]) -> None:
            for j, expert in enumerate(chosen):
                for name, parts in self.inputs.items():
                    said = logits(module, j, parts[expert.task])
                    found[f"{who}.{name}.{j}"] = said.numpy()
                if j in judged:
                    answers = logits(module, j, tests[j]).argmax(-1)
                    right = answers == torch.cat(list(tests[j].labels))
                    found[f"{who}.right.{j}"] = right.numpy()

        every = range(len(chosen))
        look("base", self.runner.put(read_state(family.base_path(chosen[0].base))), every)
        for k, expert in enumerate(chosen):
            look(f"expert{k}", self.runner.put(self.experts.state(expert.name)), [k])
        recipe = make_recipe(
            {
                "base": str(family.base_path(chosen[0].base)),
                "experts": [{"path": str(self.experts.path(e.name))} for e in chosen],
                "rules": list(family.rules),
            }
        )
        for place, module in merged(recipe, tried(family.name, number), family.factory):
            look(str(place), module.eval(), every)
        return found


def main() -> None:
    """Capture set after set until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--sets", choices=["odd", "even", "all"], default="all")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=79)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["MERGEWELL_WORKERS"] = "1"
    until = time.monotonic() + 60 * given.minutes
    family = make_family(given.family, given.data, given.cache)
    book = Book(family.folder / "experts.jsonl", EXPERT, known("experts", given.family))
    experts = Experts(family, book)
    there = experts.there()
    out = captured(given.cache, given.family)
    out.mkdir(parents=True, exist_ok=True)
    capture = Capture(family, experts)
    steps = {"odd": 2, "even": 2, "all": 1}[given.sets]
    start = given.first + (given.sets != "all" and given.first % 2 != (given.sets == "odd"))
    for number in range(start, given.last + 1, steps):
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


def captured(cache: Path, family: str) -> Path:
    """Return where a family's sets lie."""
    return cache.parent / "tune" / "fresh" / family


if __name__ == "__main__":
    main()
