"""WiSE-FT: between a base with a linear probe's head and a fine-tuned model, on images.

    python benchmarks/interpolation/wise_ft.py --data DATA [--families F ...] [--seeds 3]
    python benchmarks/interpolation/pages.py

Every row goes to `wise_ft.csv` beside this file as soon as it is measured; what stands there is not
measured again. Weights are `base + alpha * (expert - base)`, a recipe with one expert; the head of
class prototypes is frozen and the same for all. The small CNN is that of `benchmarks/scale` (width
1); EfficientNet-Lite0's experts of seeds 0 and 1 are those of `benchmarks/quality`, and those of
others are trained here the same way.

Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT).
Departures: the base's head is made of 30 images a class rather than of text; the shifts are
corruptions made here rather than data sets of their own.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1] / "quality"))
sys.path.append(str(Path(__file__).parents[1] / "scale"))

import family as generated
import on_vision
from benchmark import KEEP

from mergewell.demo import vision
from mergewell.models.loader import load_state
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import merge_tensors

RESULTS = Path(__file__).parent / "wise_ft.csv"
FIELDS = ("family", "task", "seed", "alpha", "measure", "accuracy", "images", "cpu_s")
ALPHAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
OWN, SHIFTED, OTHERS = 200, 100, 60
"""Test images of the task, of each shift, of each other task."""


def noise(x: Tensor, seed: int) -> Tensor:
    """Add normal noise of a fifth of the range's half."""
    return x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def blur(x: Tensor, _: int) -> Tensor:
    """Average over 5 x 5 pixels; of small images, over 3 x 3."""
    size = 5 if x.shape[-1] > 16 else 3
    return functional.avg_pool2d(x, size, 1, size // 2, count_include_pad=False)


def contrast(x: Tensor, _: int) -> Tensor:
    """Take 60 % of the contrast away."""
    middle = x.mean((1, 2, 3), keepdim=True)
    return middle + 0.4 * (x - middle)


def pixelate(x: Tensor, _: int) -> Tensor:
    """Leave one pixel of 4 x 4; of small images, of 2 x 2."""
    size = 4 if x.shape[-1] > 16 else 2
    small = functional.avg_pool2d(x, size)
    return functional.interpolate(small, scale_factor=size, mode="nearest")


SHIFTS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "noise": noise, "blur": blur, "contrast": contrast, "pixelate": pixelate,
}  # fmt: skip

Part = tuple[str, Tensor, Tensor, Tensor]
"""A measure's name, images [N, 3, H, W], labels [N], and the head [C, F]."""


@dataclass(frozen=True)
class Pair:
    """A base and its expert, and what both are judged on."""

    family: str
    task: str
    seed: int
    base: Path
    expert: Path
    module: nn.Module
    parts: Sequence[Part]
    keep: Sequence[str] = ()
    """Tensors that stay the base's."""


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=[*FAMILIES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/mergewell")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = {(row["family"], row["task"], row["seed"]) for row in rows()}
    for family in given.families:
        make, tasks = FAMILIES[family]
        for seed in range(given.seeds):
            for task in tasks:
                if (family, task, str(seed)) not in done:
                    write(measured(make(given.data, given.cache, task, seed)))


def measured(pair: Pair) -> list[dict[str, Any]]:
    """Return rows for all coefficients of a pair."""
    began = time.process_time()
    found: list[dict[str, Any]] = []
    for alpha in ALPHAS:
        recipe = make_recipe(
            {
                "base": str(pair.base),
                "experts": [{"path": str(pair.expert)}],
                "method": {"name": "task_arithmetic", "scale": alpha},
                "rules": [{"match": match, "method": KEEP} for match in pair.keep],
            }
        )
        load_state(pair.module, dict(merge_tensors(make_plan(recipe))))
        module = pair.module.to(memory_format=torch.channels_last)
        for name, x, y, head in pair.parts:
            found.append(
                {
                    "family": pair.family, "task": pair.task, "seed": pair.seed, "alpha": alpha,
                    "measure": name, "accuracy": round(accuracy(module, x, y, head), 5),
                    "images": len(y), "cpu_s": round(time.process_time() - began, 1),
                }
            )  # fmt: skip
    return found


def of_small_cnn(data: Path, cache: Path, task: str, seed: int) -> Pair:
    """Return a pair of the family that `benchmarks/scale` generates."""
    made = _generated(data, cache, seed)
    parts: list[Part] = []
    for other in generated.TASKS:
        x, y = made.images(other, "test")
        parts += both_kinds(other == task, other, x, y, made.head(other), seed)
    return Pair("small_cnn", task, seed, made.base(), made.expert(task), made.module(), parts)


@functools.cache
def _generated(data: Path, cache: Path, seed: int) -> generated.Generated:
    return generated.Generated(data, cache / "scale", 1.0, seed)


def of_efficientnet(data: Path, cache: Path, task: str, seed: int) -> Pair:
    """Return a pair of EfficientNet-Lite0, trained here where the benchmark has none of a seed."""
    path = on_vision.expert_path(data, cache / "quality", task, seed)
    if not path.exists():
        path = cache / "wise_ft" / f"{task}.{seed}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        growing = path.with_suffix(".growing")
        on_vision.train(data, growing, task, seed)
        growing.rename(path)
    base = on_vision.base_module()
    parts: list[Part] = []
    for other in on_vision.TASKS:
        array = on_vision.arrays(data, other)
        count = OWN if other == task else OTHERS
        order = np.random.default_rng([5, seed]).permutation(len(array["y_test"]))[:count]
        x = vision.prepare(on_vision.images(array, "test", order))
        y = torch.from_numpy(array["y_test"][order].astype(np.int64))
        parts += both_kinds(other == task, other, x, y, on_vision.head(base, array), seed)
    keep = ("_fc.*", "*.running_*", "*.num_batches_tracked")
    file = vision.base_checkpoint_path()
    return Pair("efficientnet", task, seed, file, path, base, parts, keep)


def both_kinds(
    own: bool, name: str, x: Tensor, y: Tensor, head: Tensor, seed: int
) -> Iterator[Part]:
    """Yield the task as it is and shifted; or another task, as it is."""
    yield "own" if own else f"other {name}", x, y, head
    for shift, function in SHIFTS.items() if own else ():
        yield f"shift {shift}", function(x[:SHIFTED], seed), y[:SHIFTED], head


FAMILIES: Mapping[str, tuple[Callable[[Path, Path, str, int], Pair], Sequence[str]]] = {
    "small_cnn": (of_small_cnn, generated.TASKS),
    "efficientnet": (of_efficientnet, ("cifar10", "fashion_mnist")),
}


def accuracy(module: nn.Module, x: Tensor, y: Tensor, head: Tensor) -> float:
    """Return the accuracy of a module under a head."""
    pieces = [piece.contiguous(memory_format=torch.channels_last) for piece in x.split(50)]
    with torch.no_grad():
        features = torch.cat([module(piece) for piece in pieces])
    return float((vision.logits(features, head).argmax(1) == y).float().mean())


def rows() -> list[dict[str, str]]:
    """Return what was measured."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def write(found: Any) -> None:
    """Append rows."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
