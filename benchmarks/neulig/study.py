"""NeuLig on real experts: merging against ensembling in every mode, with controls.

Three families of five experts: EfficientNet-Lite0 (CNN), MiniLM (transformer), and small CNNs
trained here from five *different* random beginnings (diverse origin, each with its own head). For
each, Portland and the static coefficients are trained on a few training inputs a task, with
labels, entropy, or each expert's own answers, and judged on test inputs that chose nothing. Three
seeds draw the inputs and Portland's weights; the experts are the same. Rows go to OUT as they are
finished; rows that are there are not made again.

    python benchmarks/neulig/study.py --data /work/shared/data --out benchmarks/neulig/results.csv
    python benchmarks/neulig/page.py
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))

import on_text
import on_vision

from mergewell.demo import vision
from mergewell.descent.tasks import Aim, LearningTask
from mergewell.neulig.agreement import agreement, merged_logits
from mergewell.neulig.modes import Merges, Mode, coefficients_of, entropy, merges, passes
from mergewell.neulig.offsets import Offsets, Penalty, offsets
from mergewell.neulig.portland import Constant, Portland, embeddings, pooled
from mergewell.neulig.training import Training, ensemble_logits, train
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe

TASKS = {
    "cnn": ("gtsrb", "cifar10", "mnist", "fashion_mnist", "kannada"),
    "transformer": ("trec", "agnews", "banking77", "snips", "sst2"),
    "diverse": ("mnist", "fashion_mnist", "kannada", "usps", "notmnist"),
}
TEST = 400
"""Test inputs a task at most."""
AIMS: tuple[Aim, ...] = ("labels", "entropy", "expert")
SEEDS = (0, 1, 2)
INPUTS = (16, 128)
"""Learning inputs a task; the paper takes the experts' whole training sets."""
MODES: tuple[Mode, ...] = ("batch", "batch_mean", "task", "global")
FIELDS = (
    "family", "seed", "inputs", "aim", "penalty", "mode", "task", "merged", "ensemble",
    "disagreement", "divergence", "entropy", "passes",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Five experts, and the inputs of their tasks."""

    recipe: Recipe
    factory: Callable[[], nn.Module]
    test: Sequence[LearningTask]
    learning: Callable[[int, int], Sequence[LearningTask]]
    """Seed and number of inputs to learning tasks."""


def main() -> None:
    """Make the rows that are missing."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"))
    arguments.add_argument("--cache", type=Path, default=Path.home() / ".cache/mergewell/neulig")
    arguments.add_argument("--families", nargs="+", default=list(TASKS), choices=list(TASKS))
    arguments.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=SEEDS)
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    makers = {"cnn": images, "transformer": texts, "diverse": strangers}
    for name in asked.families:
        study(name, makers[name](asked.data, asked.cache), asked.out, asked.seeds)


def study(name: str, family: Family, out: Path, seeds: Sequence[int] = SEEDS) -> None:
    """Judge everything on one family."""
    plan = make_plan(family.recipe)
    apart = offsets(plan)
    tested = embeddings(plan, family.factory, family.test)
    count = len(plan.experts)
    known = done(out)
    one_hot = torch.eye(count)
    for place, task in enumerate(TASKS[name]):
        controls = {"own expert": one_hot[place], "uniform": torch.full((count,), 1 / count)}
        for mode, shares in controls.items():
            key = (name, "0", "0", "-", "-", mode, task)
            if key not in known:
                found = Merges(shares[None], torch.zeros(len(tested[place]), dtype=torch.int64))
                record(out, key, judged(family, place, tested, found), entropy(shares), 1)
    for seed in seeds:
        for inputs in INPUTS:
            tasks = family.learning(seed, inputs)
            outputs = embeddings(plan, family.factory, tasks)
            for aim in AIMS:
                learned(name, family, tested, tasks, outputs, apart, (seed, inputs, aim), out)


def learned(
    name: str,
    family: Family,
    tested: Sequence[Tensor],
    tasks: Sequence[LearningTask],
    outputs: Sequence[Tensor],
    apart: Offsets,
    what: tuple[int, int, Aim],
    out: Path,
) -> None:
    """Train Portland (faithful penalty) and the static coefficients (dispersion); judge them."""
    seed, inputs, aim = what
    known = done(out)
    count = outputs[0].shape[1]
    plans: list[tuple[Penalty, tuple[Mode, ...]]] = [("scalar", MODES), ("dispersion", ("static",))]
    for penalty, modes in plans:
        keys = {
            (mode, place): (name, str(seed), str(inputs), aim, penalty, mode, task)
            for mode in modes
            for place, task in enumerate(TASKS[name])
        }
        if all(key in known for key in keys.values()):
            continue
        routed = penalty == "scalar"
        network = (
            Portland(count, pooled(outputs[0]).shape[-1], seed=seed) if routed else Constant(count)
        )
        rate = 1e-3 if routed else 1e-2
        how = Training(aim, penalty, 0.01, epochs=300, batch=16, rate=rate, seed=seed)
        train(network, outputs, tasks, apart, how)
        seen = [coefficients_of(network, each) for each in tested]
        taught = [coefficients_of(network, each) for each in outputs]
        for (mode, place), key in keys.items():
            if key not in known:
                found = merges(mode, seen, taught, place)
                spread = entropy(found.coefficients)
                record(out, key, judged(family, place, tested, found), spread, passes(mode, count))


def judged(
    family: Family, place: int, tested: Sequence[Tensor], found: Merges
) -> tuple[float, float, float, float]:
    """Return accuracies of merge and ensemble, disagreement and divergence, on one task."""
    task = family.test[place]
    merged = merged_logits(family.recipe, family.factory, task, found)
    together = ensemble_logits(tested[place], found.coefficients[found.owner], task)
    said = agreement(merged, together, torch.cat([*task.labels]))
    return said.merged, said.ensemble, said.disagreement, said.divergence


def done(out: Path) -> set[tuple[str, ...]]:
    """Return the keys of the rows that are there."""
    if not out.exists():
        return set()
    with out.open(newline="") as file:
        return {tuple(row[field] for field in FIELDS[:7]) for row in csv.DictReader(file)}


def record(
    out: Path, key: Sequence[str], values: Sequence[float], spread: float, cost: int
) -> None:
    """Add a row."""
    fresh = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(FIELDS)
        writer.writerow([*key, *(f"{value:.6g}" for value in values), f"{spread:.4f}", cost])
    print(*key, *(f"{value:.4g}" for value in values), flush=True)


def images(data: Path, cache: Path) -> Family:
    """Return five experts of EfficientNet-Lite0."""
    del cache
    base = on_vision.base_module()
    arrays = {task: on_vision.arrays(data, task) for task in TASKS["cnn"]}
    heads = {task: on_vision.head(base, arrays[task]) for task in TASKS["cnn"]}

    def tasks(split: str, seed: int, count: int) -> list[LearningTask]:
        made: list[LearningTask] = []
        for place, (name, array) in enumerate(arrays.items()):
            picked = drawn(len(array[f"y_{split}"]), seed, count)
            x = vision.prepare(on_vision.images(array, split, picked)).float()
            y = torch.from_numpy(array[f"y_{split}"][picked].astype(np.int64))

            def head(features: Tensor, name: str = name) -> Tensor:
                return vision.logits(features, heads[name])

            made.append(LearningTask(place, x.split(128), y.split(128), head))
        return made

    experts = [data / "experts_vision" / f"{task}.delta8.safetensors" for task in TASKS["cnn"]]
    recipe = recipe_of(vision.base_checkpoint_path(), experts)
    return Family(
        recipe, vision.efficientnet_lite0, tasks("test", 0, TEST), lambda s, n: tasks("train", s, n)
    )


def texts(data: Path, cache: Path) -> Family:
    """Return five experts of MiniLM."""
    benchmark = on_text.benchmark(data, cache, 0)
    names = TASKS["transformer"]

    def tasks(split: str, seed: int, count: int) -> list[LearningTask]:
        made: list[LearningTask] = []
        for place, name in enumerate(names):
            rows = on_text.rows(data, name, split)
            part = on_text.examples([rows[i] for i in drawn(len(rows), seed, count)])

            def head(features: Tensor, name: str = name) -> Tensor:
                return benchmark.logits(name, features)

            made.append(LearningTask(place, part.batches, part.labels, head))
        return made

    recipe = recipe_of(benchmark.base, [benchmark.experts[name] for name in names])
    return Family(
        recipe, benchmark.factory, tasks("test", 0, TEST), lambda s, n: tasks("train", s, n)
    )


class SmallCnn(nn.Module):
    """Three convolutions and a linear layer, 28 x 28 grey to 64 features; no normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return features [n, 64] of images [n, 1, 28, 28]."""
        return self.layers(x)


def strangers(data: Path, cache: Path) -> Family:
    """Return five small CNNs that share no beginning, trained on first use, each with its head."""
    cache.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Mapping[str, np.ndarray]] = {}
    for task in TASKS["diverse"]:
        with np.load(data / "vision_data" / f"{task}.npz") as archive:
            arrays[task] = {key: archive[key] for key in archive.files}
    heads: dict[str, nn.Linear] = {}
    paths: list[Path] = []
    for number, task in enumerate(arrays):
        path = cache / f"{task}.safetensors"
        head_path = cache / f"{task}.head.pt"
        if not path.exists():
            torch.manual_seed(number)  # the beginning differs from expert to expert
            module, head = SmallCnn(), nn.Linear(64, 10)
            fit(module, head, grey(arrays[task]["x_train"]), arrays[task]["y_train"])
            torch.save(head.state_dict(), head_path)
            save_file(module.state_dict(), path)
        head = nn.Linear(64, 10)
        head.load_state_dict(torch.load(head_path, weights_only=True))
        heads[task] = head.requires_grad_(False)
        paths.append(path)

    def tasks(split: str, seed: int, count: int) -> list[LearningTask]:
        made: list[LearningTask] = []
        for place, (name, array) in enumerate(arrays.items()):
            picked = drawn(len(array[f"y_{split}"]), seed, count)
            x = grey(array[f"x_{split}"][picked])
            y = torch.from_numpy(array[f"y_{split}"][picked].astype(np.int64))
            made.append(LearningTask(place, x.split(128), y.split(128), heads[name]))
        return made

    return Family(
        recipe_of(paths[0], paths), SmallCnn, tasks("test", 0, TEST),
        lambda s, n: tasks("train", s, n),
    )  # fmt: skip


def fit(module: nn.Module, head: nn.Module, x: Tensor, labels: np.ndarray) -> None:
    """Train a small network from its beginning: 5 epochs of 64, Adam 1e-3."""
    y = torch.from_numpy(labels.astype(np.int64))
    optimiser = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(5):
        for rows in torch.randperm(len(x)).split(64):
            loss = functional.cross_entropy(head(module(x[rows])), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    module.eval()


def grey(images: np.ndarray) -> Tensor:
    """Return images [n, 1, 28, 28] between -1 and 1."""
    x = torch.from_numpy(images).float().unsqueeze(1) / 127.5 - 1
    return functional.interpolate(x, size=(28, 28), mode="bilinear", antialias=True)


def drawn(total: int, seed: int, count: int) -> np.ndarray:
    """Return `count` places, drawn without replacement under a seed."""
    return np.random.default_rng(7000 + seed).permutation(total)[:count]


def recipe_of(base: Path, experts: Sequence[Path]) -> Recipe:
    """Return the recipe of these experts."""
    return make_recipe({"base": str(base), "experts": [{"path": str(path)} for path in experts]})


if __name__ == "__main__":
    main()
