"""Merging at scale: what size and the number of experts do to retention, on generated families.

    python benchmarks/scale/study.py --data DATA [--seeds 3]
    python benchmarks/scale/page.py

Every row goes to `results.csv` beside this file as soon as it is measured; what stands there is
not measured again. All eight tasks are judged at every number of experts: four pairs, two fours,
one eight, so that the tasks are the same and only their company differs.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from family import TASKS, WIDTHS, Generated
from torch import nn

from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
FIELDS = (
    "width", "seed", "parameters", "experts", "group", "task", "method", "scale", "accuracy",
    "expert", "base", "cosine", "relative_norm", "cpu_s",
)  # fmt: skip
NUMBERS = (2, 4, 8)
METHODS: Mapping[str, tuple[Mapping[str, Any], Sequence[float]]] = {
    "average": ({"name": "average"}, ()),
    "task_arithmetic": ({"name": "task_arithmetic"}, (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)),
    "ties": ({"name": "ties", "density": 0.2}, (0.1, 0.2, 0.3, 0.6, 1.0, 1.4)),
}
"""What is merged by, and the scales that 64 held-out images a task choose from."""


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/mergewell/scale")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = {(r["width"], r["seed"], r["experts"], r["group"], r["method"]) for r in rows()}
    for seed in range(given.seeds):
        for width in WIDTHS:
            family = Generated(given.data, given.cache, width, seed)
            for count in NUMBERS:
                for number, group in enumerate(groups(count, seed)):
                    of_it = (f"{width:g}", str(seed), str(count), str(number))
                    left = [method for method in METHODS if (*of_it, method) not in done]
                    if left:
                        write(list(measured(family, number, group, left)))


def groups(count: int, seed: int) -> list[tuple[str, ...]]:
    """Return the tasks in groups of `count`, alike for all widths."""
    order = np.random.default_rng([9, seed]).permutation(len(TASKS))
    names = [TASKS[i] for i in order]
    return [tuple(names[i : i + count]) for i in range(0, len(names), count)]


def measured(
    family: Generated, number: int, group: Sequence[str], methods: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each task and method of one set of experts."""
    began = time.process_time()
    experts = {task: family.expert(task) for task in group}
    base = family.module(family.base())
    alone = {
        task: (
            family.accuracy(family.module(path), task, "test"),
            family.accuracy(base, task, "test"),
        )
        for task, path in experts.items()
    }
    about = {
        "width": f"{family.width:g}", "seed": family.seed, "experts": len(group), "group": number,
        "parameters": sum(p.numel() for p in base.parameters()), **geometry(family, experts),
    }  # fmt: skip
    module = family.module()
    for method in methods:
        settings, scales = METHODS[method]
        choices = [{**settings, "scale": scale} for scale in scales] or [dict(settings)]
        best = choices[0]
        if len(choices) > 1:
            held = [
                np.mean(
                    [family.accuracy(put(module, family, experts, c), t, "held") for t in group]
                )
                for c in choices
            ]
            best = choices[int(np.argmax(held))]
        put(module, family, experts, best)
        for task in group:
            yield {
                **about, "task": task, "method": method, "scale": best.get("scale", ""),
                "accuracy": round(family.accuracy(module, task, "test"), 5),
                "expert": round(alone[task][0], 5), "base": round(alone[task][1], 5),
                "cpu_s": round(time.process_time() - began, 1),
            }  # fmt: skip


def put(
    module: nn.Module, family: Generated, experts: Mapping[str, Path], method: Mapping[str, Any]
) -> nn.Module:
    """Merge into a module and return it."""
    plan = make_plan(recipe(family, experts, method))
    module.load_state_dict(dict(merge_tensors(plan)))
    return module


def recipe(family: Generated, experts: Mapping[str, Path], method: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a merge."""
    paths = [{"path": str(path)} for path in experts.values()]
    return make_recipe({"base": str(family.base()), "experts": paths, "method": dict(method)})


def geometry(family: Generated, experts: Mapping[str, Path]) -> dict[str, float]:
    """Return the mean cosine of the task vectors, and their mean norm over the base's."""
    base = flat(family.module(family.base()))
    vectors = [flat(family.module(path)) - base for path in experts.values()]
    cosines = [
        float(nn.functional.cosine_similarity(one, other, dim=0))
        for i, one in enumerate(vectors)
        for other in vectors[:i]
    ]
    norms = [float(vector.norm() / base.norm()) for vector in vectors]
    return {
        "cosine": round(float(np.mean(cosines)), 4),
        "relative_norm": round(float(np.mean(norms)), 4),
    }


def flat(module: nn.Module) -> torch.Tensor:
    """Return all parameters of a module as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def rows() -> list[dict[str, str]]:
    """Return what was measured."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def write(found: Sequence[Mapping[str, Any]]) -> None:
    """Append rows."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
