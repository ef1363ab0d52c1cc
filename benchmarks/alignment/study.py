"""Does alignment make networks of different initialisations mergeable? `docs/studies/alignment.md`.

    python benchmarks/alignment/study.py --data /work/shared/data/vision_data \
        --out benchmarks/alignment/alignment.csv

`--data` holds `mnist.npz` and `fashion_mnist.npz` (x_train, y_train, x_test, y_test); images are
made 16 x 16. Pairs of small networks are trained on one task from different initialisations and in
different orders of the data. The second is aligned to the first by weights or activations (or not
at all), the two are averaged, and the average is judged as it is and after `repair` (REPAIR; of
networks with BatchNorm: re-estimated statistics). Alignment and repair see 500 unlabelled images
that neither network was trained on; the judging ones are 2500 others. Three seeds; one thread; all
seeded. Writes one row a pair, alignment and repair, and their means over the pairs to `--json`,
docs/studies/alignment.json; prints the page's tables.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergewell.alignment.align import Aligned, aligned
from mergewell.alignment.weights import distance
from mergewell.alignment.zipit import zipped
from mergewell.labelled import LabelledInputs, cut
from mergewell.models.barrier import measure_path, score
from mergewell.models.batch_norm import reestimate
from mergewell.models.dataflow import call, evaluating
from mergewell.models.ensemble import simplex
from mergewell.models.repair import repair

JSON = Path(__file__).parents[2] / "docs" / "studies" / "alignment.json"
TASKS = ("mnist", "fashion_mnist")
SEEDS = (0, 1, 2)
ALIGNMENTS = ("none", "weights", "activations")
WAYS = (*ALIGNMENTS, "zipit")
SIZE, BATCH, STEPS, LEARNING_RATE = 16, 100, 450, 2e-3
HELD_OUT = 500  # training images for activations and repair
POINTS = 11


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, outputs // inputs, 1, bias=False),
            nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.short = nn.Identity()
        if inputs != outputs:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.short(x))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIZE * SIZE, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


def cnn(width: int, *, norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 2 * width)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width, 10))


def resnet(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Residual(width, width), Residual(width, 2 * width), Residual(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


NETS: Mapping[str, Callable[[], nn.Module]] = {
    "MLP 64": lambda: mlp(64),
    "MLP 512": lambda: mlp(512),
    "CNN 16": lambda: cnn(16, norm=False),
    "CNN 16, BatchNorm": lambda: cnn(16, norm=True),
    "ResNet 16, BatchNorm": lambda: resnet(16),
}


def load(folder: Path, name: str) -> dict[str, Tensor]:
    with np.load(folder / f"{name}.npz") as archive:
        found = {key: torch.from_numpy(archive[key]) for key in archive.files}
    for key in ("x_train", "x_test"):
        images = found[key].float()[:, None] / 255
        images = functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        found[key] = (images - 0.3) / 0.3
    return {key: held if key[0] == "x" else held.long() for key, held in found.items()}


def trained(make: Callable[[], nn.Module], data: Mapping[str, Tensor], *, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = make().train()
    x, y = data["x_train"][HELD_OUT:], data["y_train"][HELD_OUT:]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, 2 * (1 - step / STEPS))
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return module.eval()


def averaged(one: nn.Module, two: nn.Module) -> nn.Module:
    module, states = copy.deepcopy(one), two.state_dict()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(states[name], 0.5)
    return module


def outputs(module: nn.Module, data: LabelledInputs) -> list[Tensor]:
    with evaluating([module]):
        return [call(module, batch) for batch in data.batches]


def judged(module: nn.Module, data: LabelledInputs) -> tuple[float, float]:
    return score(outputs(module, data), data.labels_by_batch)


def pair_rows(one: nn.Module, two: nn.Module, data: Mapping[str, Tensor], seed: int) -> list[dict]:
    """The rows of one pair of networks: three alignments, each as it is and repaired."""
    test = cut(data["x_test"], data["y_test"], 500)
    few = list(cut(data["x_train"][:HELD_OUT], None, 250).batches)
    ends = [judged(module, test) for module in (one, two)]
    both = zip(outputs(one, test), outputs(two, test), strict=True)
    ensemble = score([(a + b) / 2 for a, b in both], test.labels_by_batch)
    rows: list[dict[str, Any]] = []
    for way in ALIGNMENTS:
        moved, began, done = copy.deepcopy(two), time.process_time(), None
        if way != "none":
            done = aligned(one, moved, few, match=way, seed=seed)  # type: ignore[arg-type]
        seconds = time.process_time() - began
        path = measure_path(
            copy.deepcopy(one), one.state_dict(), moved.state_dict(), batches=test.batches,
            labels=test.labels_by_batch, points=POINTS, norms="as stored",
        )  # fmt: skip
        middle = averaged(one, moved)
        raw = judged(middle, test)
        repair(middle, [one, moved], list(simplex([0.5, 0.5], 2)), few)
        mended = judged(middle, test)
        for label, (loss, accuracy) in (("raw", raw), ("repaired", mended)):
            rows.append(
                {
                    "alignment": way, "repair": label, "accuracy": accuracy, "loss": loss,
                    "loss_barrier": loss - fmean(e[0] for e in ends),
                    "accuracy_barrier": fmean(e[1] for e in ends) - accuracy,
                    "line_loss_barrier": path.barrier if label == "raw" else "",
                    "line_accuracy_barrier": path.accuracy_barrier if label == "raw" else "",
                    "ends_accuracy": fmean(e[1] for e in ends), "ensemble_accuracy": ensemble[1],
                    **_how(done, one, moved), "seconds": round(seconds, 2),
                }
            )  # fmt: skip
    return [*rows, *zipit_rows(one, two, few, test, rows[0])]


def zipit_rows(
    one: nn.Module, two: nn.Module, few: list[Tensor], test: LabelledInputs, like: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows of the pair merged by ZipIt; what is known of its ends comes from another row."""
    merged, began = copy.deepcopy(two), time.process_time()
    done = zipped(one, merged, few)
    seconds = round(time.process_time() - began, 2)
    ends = like["loss"] - like["loss_barrier"], like["accuracy"] + like["accuracy_barrier"]
    rows: list[dict[str, Any]] = []
    for label in ("raw", "repaired"):
        if label == "repaired":
            if not any("running_mean" in name for name in merged.state_dict()):
                break
            reestimate(merged, few)
        loss, accuracy = judged(merged, test)
        rows.append(
            {
                **dict.fromkeys(like, ""), "alignment": "zipit", "repair": label,
                "accuracy": accuracy, "loss": loss, "loss_barrier": loss - ends[0],
                "accuracy_barrier": ends[1] - accuracy, "ends_accuracy": ends[1],
                "ensemble_accuracy": like["ensemble_accuracy"], "moved": done.within,
                "seconds": seconds,
            }
        )  # fmt: skip
    return rows


def _how(done: Aligned | None, one: nn.Module, two: nn.Module) -> dict[str, Any]:
    apart = distance(dict(one.named_parameters()), dict(two.named_parameters()))
    if done is None:
        return {"distance": apart, "moved": 0.0, "sweeps": 0, "output_change": 0.0}
    return {
        "distance": apart, "moved": done.graph.moved(done.matched.permutations),
        "sweeps": done.matched.sweeps, "output_change": done.output_change,
    }  # fmt: skip


def study_of(folder: Path, task: str, net: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    data, began, rows = load(folder, task), time.process_time(), list[dict[str, Any]]()
    for seed in SEEDS:
        one, two = (trained(NETS[net], data, seed=10 * seed + own) for own in (1, 2))
        found = pair_rows(one, two, data, seed)
        rows += [{"task": task, "net": net, "seed": seed, **row} for row in found]
    print(f"# {task}, {net}: {time.process_time() - began:.0f} s of CPU", flush=True)
    return rows


def study(folder: Path, nets: Sequence[str], workers: int, out: Path) -> list[dict[str, Any]]:
    """All rows; a file that was begun is gone on with."""
    rows = read(out) if out.is_file() else []
    known = {(row["task"], row["net"]) for row in rows if row["alignment"] == WAYS[-1]}
    rows = [row for row in rows if (row["task"], row["net"]) in known]
    jobs = [(task, net) for task in TASKS for net in nets]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = [pool.submit(study_of, folder, *job) for job in jobs if job not in known]
        for done in as_completed(running):
            rows += done.result()
            order = [*TASKS, *NETS]
            rows.sort(key=lambda r: [order.index(r["task"]), order.index(r["net"]), r["seed"]])
            write(rows, out)
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    words = ("task", "net", "alignment", "repair")
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {k: v if k in words or not v else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def table(rows: Sequence[Mapping[str, Any]], key: str, scale: float, digits: int) -> str:
    """A table of means over the seeds, with the smallest and largest."""
    columns = [(way, label) for label in ("raw", "repaired") for way in WAYS]
    lines = [
        "| task | net | " + " | ".join(f"{way}, {label}" for way, label in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for task, net in dict.fromkeys((row["task"], row["net"]) for row in rows):
        cells: list[str] = []
        for way, label in columns:
            held = [
                scale * row[key] for row in rows
                if (row["task"], row["net"], row["alignment"], row["repair"])
                == (task, net, way, label)
            ]  # fmt: skip
            if not held:
                cells.append("–")
                continue
            low, high = min(held), max(held)
            cells.append(f"{fmean(held):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})")
        lines.append(f"| {task} | {net} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def how_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Ends, ensemble and what the alignments did, means over the seeds."""
    lines = [
        "| task | net | ends | ensemble | distance | by weights | by activations "
        "| moved (w, a) | within one (zipit) | s (w, a, zipit) | line barrier (none, w, a) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task, net in dict.fromkeys((row["task"], row["net"]) for row in rows):
        own = [r for r in rows if (r["task"], r["net"], r["repair"]) == (task, net, "raw")]

        def mean(key: str, way: str, own: Sequence[Mapping[str, Any]] = own) -> float:
            held = [row[key] for row in own if row["alignment"] == way]
            return fmean(held) if held else float("nan")  # a file from before zipit

        ways = ALIGNMENTS[1:]
        lines.append(
            f"| {task} | {net} | {100 * mean('ends_accuracy', 'none'):.1f} "
            f"| {100 * mean('ensemble_accuracy', 'none'):.1f} | "
            + " | ".join(f"{mean('distance', way):.1f}" for way in ALIGNMENTS)
            + " | " + ", ".join(f"{100 * mean('moved', way):.0f} %" for way in ways)
            + f" | {100 * mean('moved', 'zipit'):.0f} %"
            + " | " + ", ".join(f"{mean('seconds', way):.2f}" for way in (*ways, "zipit"))
            + " | " + ", ".join(f"{mean('line_loss_barrier', way):.2f}" for way in ALIGNMENTS)
            + " |"
        )  # fmt: skip
        lines[-1] = lines[-1].replace("nan %", "–").replace("nan", "–")
    return "\n".join(lines)


FIGURES = (
    "accuracy", "loss", "loss_barrier", "accuracy_barrier", "line_loss_barrier",
    "line_accuracy_barrier", "ends_accuracy", "ensemble_accuracy", "distance", "moved", "seconds",
)  # fmt: skip


def as_data(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The page's figures: mean, smallest and largest over the pairs; what was not measured is
    left out. Accuracies are shares, losses nats; `moved` of zipit is the share within one model."""
    found: list[dict[str, Any]] = []
    keys = ("task", "net", "alignment", "repair")
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        own = [row for row in rows if tuple(row[key] for key in keys) == group]
        figures: dict[str, Any] = {}
        for name in FIGURES:
            if held := [float(row[name]) for row in own if row[name] != ""]:
                low, high = min(held), max(held)
                ends = {"mean": fmean(held), "low": low, "high": high}
                figures[name] = {key: float(f"{value:.4g}") for key, value in ends.items()}
        found.append({**dict(zip(keys, group, strict=True)), "pairs": len(own), **figures})
    return {"version": 1, "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--net", action="append", choices=list(NETS), help="all if absent; repeat")
    parser.add_argument("--workers", type=int, default=1, help="processes; numbers stay the same")
    parser.add_argument("--json", type=Path, default=JSON, help="the figures of the page")
    given = parser.parse_args()
    rows = study(given.data, given.net or list(NETS), given.workers, given.out)
    given.json.write_text(json.dumps(as_data(rows), indent=1) + "\n", encoding="utf-8")
    for title, text in (
        ("Accuracy of the average, %", table(rows, "accuracy", 100, 1)),
        ("Loss barrier at the middle, nats", table(rows, "loss_barrier", 1, 2)),
        ("Ends and alignments", how_table(rows)),
    ):
        print(f"\n{title}\n\n{text}")


if __name__ == "__main__":
    main()
