"""Do L2-SP, SAM and weight-scope alignment give experts that merge better at equal accuracy?

    python benchmarks/atlas/fine_tuning.py --data DATA [--seeds 3]

Experts of the small CNN's base b0 on six tasks, each fine-tuned plainly at three learning rates
(the control: a curve of own against merged accuracy) and, at the highest of these, with each
penalty or SAM. Merges: five sets of 4 and all 6, by average and by task arithmetic.
Writes docs/studies/fine_tuning.json, from which `advice.py` takes its section; rows are kept in
the cache and are not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from book import Book, rounded
from family import Run, State, batches_of, read_state, right
from run import cache_folder
from small_cnn import SmallCnnFamily
from torch import Tensor, nn
from torch.nn import functional

from mergewell.demo.training import schedule
from mergewell.finetune import L2SP, Sam, WeightScope

OUT = Path(__file__).parents[2] / "docs/studies/fine_tuning.json"
BASE = "b0"
TASKS = ("mnist", "fashion_mnist", "notmnist", "kannada", "cifar10", "gtsrb_low")
STEPS, BATCH, SAMPLES, TESTED = 60, 32, 1500, 300
RATES = (5e-4, 1e-3, 2e-3)
SCALE = 0.4
"""Of task arithmetic."""


@dataclass(frozen=True)
class Way:
    """One way to fine-tune."""

    name: str
    strength: float = 0.0
    rate: float = RATES[-1]

    @property
    def words(self) -> str:
        """The way as a table names it."""
        return f"plain, rate {self.rate:g}" if self.name == "plain" else (
            f"{self.name} {self.strength:g}"
        )  # fmt: skip


WAYS = (
    *(Way("plain", rate=rate) for rate in RATES),
    *(Way("L2-SP", strength) for strength in (0.01, 0.1)),
    Way("SAM", 0.1),
    Way("weight scope", 10.0),
)


def expert(family: SmallCnnFamily, task: str, way: Way, seed: int) -> State:
    """Return the weights of one fine-tuning; the same seed gives all ways the same batches."""
    rng = np.random.default_rng([71, TASKS.index(task), seed])
    torch.manual_seed(seed)
    module = family.factory().train()
    module.load_state_dict(read_state(family.base_path(BASE)))
    head = family.head(BASE, task)
    x, y = family._split(task, "train")
    rest = rng.permutation(len(y))[:SAMPLES]
    x, y = x[rest], y[rest]
    run = Run(family=family.name, base=BASE, task=task, number=0, batch=BATCH, steps=STEPS)
    order = batches_of(len(y), run, rng)
    optimiser = torch.optim.AdamW(module.parameters(), lr=way.rate, weight_decay=0.0)
    penalty = _penalty(way, module)
    sam = Sam(module.parameters(), radius=way.strength) if way.name == "SAM" else None
    for step in range(STEPS):
        picked = torch.from_numpy(order[step])

        def loss(picked: Tensor = picked) -> Tensor:
            return functional.cross_entropy(family.logits(module(x[picked]), head), y[picked])

        optimiser.zero_grad()
        if sam is not None:
            sam.backward(loss)
        else:
            loss().backward()
        if penalty is not None:
            penalty.add_gradient()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = way.rate * schedule(step, STEPS, STEPS // 10)
        optimiser.step()
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _penalty(way: Way, module: nn.Module) -> L2SP | WeightScope | None:
    if way.name == "L2-SP":
        return L2SP(module.parameters(), strength=way.strength)
    return WeightScope(module, strength=way.strength) if way.name == "weight scope" else None


def judged(family: SmallCnnFamily) -> Callable[[State, str], float]:
    """Return what gives the accuracy of weights on a task."""
    module = family.factory().eval()
    tests: dict[str, tuple[Tensor, Tensor]] = {}
    for task in TASKS:
        x, y = family._split(task, "test")
        picked = np.random.default_rng(11).permutation(len(y))[:TESTED]
        tests[task] = (x[picked], y[picked])

    def accuracy(state: State, task: str) -> float:
        module.load_state_dict(state)
        x, y = tests[task]
        with torch.inference_mode():
            return right(family, module(x), family.head(BASE, task), y)

    return accuracy


def row(family: SmallCnnFamily, way: Way, seed: int) -> dict[str, Any]:
    """Return what one way gives with one seed, over all sets."""
    accuracy = judged(family)
    base = read_state(family.base_path(BASE))
    states = {task: expert(family, task, way, seed) for task in TASKS}
    own = {task: accuracy(state, task) for task, state in states.items()}
    moved = {
        task: sum(float((s[n] - base[n]).square().sum()) for n in s) ** 0.5
        for task, s in states.items()
    }
    size = sum(float(t.square().sum()) for t in base.values()) ** 0.5
    found: dict[str, Any] = {
        "way": way.words, "seed": seed, "own": float(np.mean(list(own.values()))),
        "distance": float(np.mean(list(moved.values()))) / size,
    }  # fmt: skip
    merged: dict[str, list[float]] = {"average": [], "task arithmetic": []}
    kept: dict[str, list[float]] = {"average": [], "task arithmetic": []}
    for chosen in (*list(combinations(TASKS, 4))[::3], TASKS):
        for method, scale in (("average", 1 / len(chosen)), ("task arithmetic", SCALE)):
            state = {
                n: t + scale * torch.stack([states[c][n] - t for c in chosen]).sum(0)
                for n, t in base.items()
            }
            scores = {task: accuracy(state, task) for task in chosen}
            merged[method].append(float(np.mean(list(scores.values()))))
            kept[method].append(float(np.mean([scores[t] / own[t] for t in chosen])))
    for method in merged:
        found[method] = float(np.mean(merged[method]))
        found[f"{method} retention"] = float(np.mean(kept[method]))
    return found


def told(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds, and each way's merged accuracy beside plain at equal own accuracy.

    Plain's curve is taken seed by seed, linear between its learning rates.
    """
    seeds = sorted({r["seed"] for r in rows})
    at = {(r["way"], r["seed"]): r for r in rows}
    plain = [way.words for way in WAYS if way.name == "plain"]
    ways: list[dict[str, Any]] = []
    for way in WAYS:
        mine = [at[way.words, seed] for seed in seeds]
        one: dict[str, Any] = {"way": way.words}
        for key in mine[0]:
            if key not in ("way", "seed"):
                one[key] = float(np.mean([r[key] for r in mine]))
        for method in ("average", "task arithmetic"):
            gains: list[float] = []
            for seed, r in zip(seeds, mine, strict=True):
                curve = sorted((at[p, seed]["own"], at[p, seed][method]) for p in plain)
                x, y = zip(*curve, strict=True)
                gains.append(100 * (r[method] - float(np.interp(r["own"], x, y))))
            if way.name != "plain":
                one[f"{method} gain"] = {
                    "mean": float(np.mean(gains)), "low": min(gains), "high": max(gains),
                }  # fmt: skip
        ways.append(one)
    return {"version": 1, "seeds": seeds, "ways": ways} | _section(ways, len(seeds))


def _section(ways: Sequence[dict[str, Any]], seeds: int) -> dict[str, Any]:
    """Return the columns, rows and text that the page shows."""
    columns = [
        "average", "retention", "beside plain at equal own accuracy", "task arithmetic",
        "retention", "beside plain at equal own accuracy",
    ]  # fmt: skip
    table: list[list[str]] = []
    clear: dict[str, list[str]] = {"above": [], "below": []}
    for one in ways:
        cells = [one["way"], f"{100 * one['own']:.1f}", f"{one['distance']:.3f}"]
        for method in ("average", "task arithmetic"):
            gain = one.get(f"{method} gain")
            ends = f" [{_signed(gain['low'])}, {_signed(gain['high'])}]" if gain else ""
            beside = f"{_signed(gain['mean'])}{ends}" if gain else ""
            if gain and (gain["low"] > 0 or gain["high"] < 0):
                clear["above" if gain["low"] > 0 else "below"].append(
                    f"{one['way']} by {method} ({_signed(gain['mean'])} points)"
                )
            kept = 100 * one[f"{method} retention"]
            cells += [f"{100 * one[method]:.1f}", f"{kept:.1f}", beside]
        table.append(cells)
    text = [
        f"The small CNN's base {BASE}, {len(TASKS)} tasks, {STEPS} steps of {BATCH} on {SAMPLES}",
        f"examples, AdamW, {seeds} seeds, {TESTED} test images a task; five sets of 4 of the tasks",
        f"and all 6, by average and by task arithmetic (scale {SCALE}), in %. Made by",
        "",
        "    python benchmarks/atlas/fine_tuning.py --data DATA",
        "",
        "The control is plain fine-tuning at three learning rates; the others train at the",
        "highest. Beside plain: points of merged accuracy above plain's curve at the way's own",
        "accuracy, mean [least, largest of the seeds]; outside of the curve its end is taken.",
        "",
        *(
            f"Merges {side} plain's at equal own accuracy with every seed: "
            f"{'; '.join(found) if found else 'none'}."
            for side, found in clear.items()
        ),
        "Little speaks for any of them here beyond what a lower rate does; one network, one base,",
        "short runs and one strength or two each: no verdict on the methods.",
    ]
    return {"columns": columns, "table": table, "text": text}


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def main() -> None:
    """Train, merge, judge and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    family = SmallCnnFamily(given.data, cache_folder())
    family.prepare()
    book = Book(family.folder / "fine_tuning.jsonl", ("way", "seed"))
    for seed in range(given.seeds):
        for way in WAYS:
            if not book.has({"way": way.words, "seed": seed}):
                book.add(row(family, way, seed))
    rows = [r for r in book.rows.values() if r["seed"] < given.seeds]
    OUT.write_text(json.dumps(rounded(told(rows)), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
