"""Does interpolation go in three stages? What models answer on the way from one to another.

    python benchmarks/interpolation/stages.py --data DATA [--families small_cnn minilm language]
    python benchmarks/interpolation/pages.py

Every row goes to `stages.csv` beside this file as soon as it is measured; what stands there is not
measured again. Weights are `start + x * (end - start)`: a recipe with the start as base and one
expert. On inputs whose answers differ between both ends it is counted how many the model between
answers as its start, as its end, or otherwise. An even change would be a straight line; three
stages are a flat one, a steep one between 0.4 and 0.6, and a flat one.

Source: Wu et al. 2025, "Revisiting model interpolation for efficient reasoning" (2510.10977), whose
models think abruptly from 0.4 on.
Departures: no two models here differ in thinking, so answers are compared rather than whether there
are thoughts.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "quality"))
sys.path.append(str(Path(__file__).parents[1] / "scale"))

import family as generated
import on_language
import on_text

from mergewell.demo import text
from mergewell.models.loader import ModuleSource, load_state
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import merge_tensors

RESULTS = Path(__file__).parent / "stages.csv"
FIELDS = (
    "family", "seed", "path", "x", "accuracy", "as_start", "as_end", "otherwise", "differing",
    "answers", "cpu_s",
)  # fmt: skip
GRID = tuple(round(0.1 * i, 1) for i in range(11))
TEXTS, PIECES = 60, 16
TEXT_TASKS = ("trec", "sst2", "agnews")


@dataclass(frozen=True)
class Way:
    """A way from one model to another, and what its models answer."""

    family: str
    seed: int
    path: str
    start: Path
    end: Path
    module: nn.Module
    answers: Callable[[nn.Module], Tensor]
    """The answers [N] of a module."""

    labels: Tensor
    """The right answers [N]."""


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=[*WAYS])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/mergewell")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = {(row["family"], row["seed"], row["path"]) for row in rows()}
    for name in given.families:
        for way in WAYS[name](given.data, given.cache):
            if (way.family, str(way.seed), way.path) not in done:
                write(measured(way))


def measured(way: Way) -> list[dict[str, Any]]:
    """Return a row for each place of a way."""
    began = time.process_time()
    found = {x: way.answers(put(way, x)) for x in (0.0, 1.0)}
    differing = found[0.0] != found[1.0]
    made: list[dict[str, Any]] = []
    for x in GRID:
        answers = found[x] if x in found else way.answers(put(way, x))
        some = answers[differing]
        shares = [float((some == found[end][differing]).float().mean()) for end in (0.0, 1.0)]
        made.append(
            {
                "family": way.family, "seed": way.seed, "path": way.path, "x": x,
                "accuracy": round(float((answers == way.labels).float().mean()), 5),
                "as_start": round(shares[0], 5), "as_end": round(shares[1], 5),
                "otherwise": round(1 - sum(shares), 5), "differing": int(differing.sum()),
                "answers": len(answers), "cpu_s": round(time.process_time() - began, 1),
            }
        )  # fmt: skip
    return made


def put(way: Way, x: float) -> nn.Module:
    """Return the module at a place of the way."""
    recipe = make_recipe(
        {
            "base": str(way.start),
            "experts": [{"path": str(way.end)}],
            "method": {"name": "task_arithmetic", "scale": x},
        }
    )
    load_state(way.module, dict(merge_tensors(make_plan(recipe))))
    return way.module


def of_small_cnn(data: Path, cache: Path) -> Iterator[Way]:
    """Yield ways from the base to experts, and from one expert to the next."""
    for seed in range(3):
        made = generated.Generated(data, cache / "scale", 1.0, seed)
        for number, task in enumerate(generated.TASKS):
            x, labels = made.images(task, "test")
            head = made.head(task)

            def answers(
                module: nn.Module, x: Tensor = x, head: Tensor = head, made: Any = made
            ) -> Tensor:
                with torch.no_grad():
                    features = torch.cat([module(piece) for piece in x.split(100)])
                return made.logits(features, head).argmax(1)

            before = generated.TASKS[number - 1]
            for start, path in (("base", made.base()), (before, made.expert(before))):
                yield Way(
                    "small_cnn", seed, f"{start} to {task}", path, made.expert(task),
                    made.module(), answers, labels,
                )  # fmt: skip


def of_minilm(data: Path, cache: Path) -> Iterator[Way]:
    """Yield ways from MiniLM to its experts; two seeds of experts are there."""
    for seed in range(2):
        for task in TEXT_TASKS:
            known = on_text.rows(data, task, "test")
            picked = np.random.default_rng([6, seed]).permutation(len(known))[:TEXTS]
            part = on_text.examples([known[i] for i in picked])
            head = on_text.head(data, task)

            def answers(module: nn.Module, part: Any = part, head: Tensor = head) -> Tensor:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    features = torch.cat([module(**batch).float() for batch in part.batches])
                return text.logits(features, head).argmax(1)

            end = on_text.expert_path(data, cache / "quality", task, seed)
            yield Way(
                "minilm", seed, f"base to {task}", text.base_checkpoint_path(), end,
                text.encoder(), answers, torch.cat([*part.labels]),
            )  # fmt: skip


def of_language(data: Path, cache: Path) -> Iterator[Way]:
    """Yield the way from SmolLM2-135M-Instruct to an expert of requests; one seed is there."""
    base = on_language.base_folder(cache / "quality")
    task, seed = "clinc150", 0
    ids = on_language.pieces(data, base, task, "test")[:PIECES]

    def answers(module: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return torch.cat(
                [module(input_ids=i).logits[:, :-1].argmax(-1).flatten() for i in ids.split(4)]
            )

    end = on_language.expert_path(data, cache / "quality", task, seed)
    yield Way(
        "language", seed, f"base to {task}", base, end, ModuleSource.parse(base).build(), answers,
        ids[:, 1:].flatten(),
    )  # fmt: skip


WAYS: dict[str, Callable[[Path, Path], Iterator[Way]]] = {
    "small_cnn": of_small_cnn, "minilm": of_minilm, "language": of_language,
}  # fmt: skip


def rows() -> list[dict[str, str]]:
    """Return what was measured."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def write(found: list[dict[str, Any]]) -> None:
    """Append rows."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
