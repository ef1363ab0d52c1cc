"""Weights, features or logits? The study behind `docs/studies/averaging.md`.

    python benchmarks/explain/averaging.py --data /work/shared/data/vision_data \
        --out docs/studies/averaging.json

`--data` holds `mnist.npz` and `fashion_mnist.npz` (x_train, y_train, x_test, y_test); images are
made 16 x 16. Four small networks are trained on mnist for a start, then five experts of each on
nine tenths of fashion_mnist each, from three starts: the same network and classifier, the same
network with a fresh classifier each, and a fresh network each. Three seeds of all. Everything is
seeded; one thread. The tables of the page are printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergewell.evaluate import Estimate
from mergewell.explain.averaging import Averaging, compare_averaging
from mergewell.explain.split import find_classifier, run_split, soup
from mergewell.explain.stability import measure_stability
from mergewell.explain.templates import compare_templates, smoothness
from mergewell.labelled import LabelledInputs, accuracy, cut
from mergewell.models.batch_norm import reestimate
from mergewell.models.repair import repair

SEEDS = (0, 1, 2)
COUNTS = (2, 3, 5)
STARTS = ("shared", "fresh_head", "independent")
STEPS = {"base": 120, "shared": 100, "fresh_head": 100, "independent": 200}
BATCH = 64
SIZE = 16  # pixels a side: a third of the time of 28
LEARNING_RATE = 2e-3
CHOOSING, JUDGING = 500, 1000
SHAKEN = 500  # test images behind the stability curves
FACTORS = (0.1, 0.5, 1.0, 2.0, 10.0, 100.0)
NOISES = (0.1, 0.2, 0.5)


class TinyViT(nn.Module):
    """16 patches of 4 x 4, width 32, two blocks; no dropout, as nothing is regularised here."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 32, 4, 4)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, 32))
        self.blocks = nn.Sequential(
            *[
                nn.TransformerEncoderLayer(
                    32, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(2)
            ]
        )
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def cnn(*, norm: bool) -> nn.Module:
    parts: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16), (16, 32)):
        parts.append(nn.Conv2d(inputs, outputs, 3, padding=1))
        parts += [nn.BatchNorm2d(outputs)] if norm else []
        parts += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(128, 10))


NETS: Mapping[str, Callable[[], nn.Module]] = {
    "MLP": mlp,
    "CNN": lambda: cnn(norm=False),
    "CNN, BatchNorm": lambda: cnn(norm=True),
    "ViT": TinyViT,
}


def load(folder: Path, name: str) -> dict[str, Tensor]:
    with np.load(folder / f"{name}.npz") as archive:
        return {
            key: (_resized(torch.from_numpy(archive[key]).float()[:, None] / 255) - 0.3) / 0.3
            if key.startswith("x")
            else torch.from_numpy(archive[key]).long()
            for key in ("x_train", "y_train", "x_test", "y_test")
        }


def _resized(images: Tensor) -> Tensor:
    return functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)


def train(
    module: nn.Module, x: Tensor, y: Tensor, *, seed: int, steps: int, decay: float = 0.0
) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(len(x), generator=generator)[: len(x) * 9 // 10]
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=decay)
    module.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, 2 * (1 - step / steps))
        chosen = kept[torch.randint(len(kept), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return module.eval()


def experts_of(
    make: Callable[[], nn.Module], start: str, base: nn.Module, data: dict[str, Tensor], seed: int
) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    x, y = data["x_train"][CHOOSING:], data["y_train"][CHOOSING:]
    for place in range(max(COUNTS)):
        own = 1000 * seed + place
        torch.manual_seed(own)
        module = make() if start == "independent" else copy.deepcopy(base)
        if start == "fresh_head":
            last = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
            last.reset_parameters()
        found[f"e{place}"] = train(module, x, y, seed=own, steps=STEPS[start])
    return found


def value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def row_of(found: Averaging) -> dict[str, Any]:
    """The numbers of one comparison that the page shows."""
    row: dict[str, Any] = {}
    for variant in found.variants:
        key = variant.way + ("_reestimated" if variant.batch_norm == "reestimated" else "")
        row.setdefault(key, []).append(value(variant.accuracy))
    row = {key: fmean(values) for key, values in row.items()}
    row["greedy_kept"] = len(found.of("greedy_soup").members)
    row["agreement"] = found.of("uniform_soup").agreement.value
    for part in found.decompositions:
        mark = "_reestimated" if part.batch_norm == "reestimated" else ""
        for name in ("difference", "covariance", "nonlinearity", "cosine", "residual"):
            row[name + mark] = getattr(part, name)
    return row


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean, smallest and largest over the seeds, by key."""
    return {
        key: {
            "mean": fmean(row[key] for row in rows),
            "low": min(row[key] for row in rows),
            "high": max(row[key] for row in rows),
        }
        for key in rows[0]
    }


def repaired(models: Sequence[nn.Module], choosing: LabelledInputs, test: LabelledInputs) -> float:
    merged = soup(models)
    repair(merged, models, [1 / len(models)] * len(models), choosing.batches)
    return accuracy(merged, test)


def study(folder: Path) -> dict[str, Any]:
    mnist, fashion = load(folder, "mnist"), load(folder, "fashion_mnist")
    choosing = cut(fashion["x_train"][:CHOOSING], fashion["y_train"][:CHOOSING], 250)
    test = cut(fashion["x_test"][:JUDGING], fashion["y_test"][:JUDGING], 250)
    few = cut(fashion["x_test"][-SHAKEN:], fashion["y_test"][-SHAKEN:], 250)
    averaging: list[dict[str, Any]] = []
    templates: list[dict[str, Any]] = []
    stability: list[dict[str, Any]] = []
    seconds = 0.0
    for net, make in NETS.items():
        rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
        matches: dict[str, list[dict[str, float]]] = {}
        points: dict[tuple[Any, ...], list[dict[str, float]]] = {}
        for seed in SEEDS:
            began = time.process_time()
            torch.manual_seed(seed)
            base = train(make(), mnist["x_train"], mnist["y_train"], seed=seed, steps=STEPS["base"])
            seconds += time.process_time() - began
            for start in STARTS:
                began = time.process_time()
                experts = experts_of(make, start, base, fashion, seed)
                seconds += time.process_time() - began
                for count in COUNTS:
                    some = dict(list(experts.items())[:count])
                    row = row_of(compare_averaging(some, test, choosing=choosing, seed=seed))
                    row["repair"] = repaired(list(some.values()), choosing, test)
                    rows.setdefault((start, count), []).append(row)
                three = dict(list(experts.items())[:3])
                matches.setdefault(start, []).append(_matched(three, test))
                if start == "shared":
                    found = measure_stability(
                        list(three.values()), few, factors=FACTORS, noises=NOISES,
                        measuring=choosing, seed=seed, draws=2,
                    )  # fmt: skip
                    for p in found.points:
                        key = (p.curve, p.subject, p.which, p.amount, p.batch_norm)
                        points.setdefault(key, []).append(
                            {"accuracy": p.accuracy or 0.0, "agreement": p.agreement,
                             "calibration_error": p.calibration_error or 0.0}
                        )  # fmt: skip
            print(f"{net} {seed}: {seconds:.0f} s of training", file=sys.stderr, flush=True)
        averaging += [
            {"net": net, "start": start, "experts": count, **mean_of(found)}
            for (start, count), found in rows.items()
        ]
        templates += [{"net": net, "start": s, **mean_of(found)} for s, found in matches.items()]
        stability += [
            {"net": net, "curve": key[0], "subject": key[1], "which": key[2], "amount": key[3],
             "batch_norm": key[4], **mean_of(found)}
            for key, found in points.items()
        ]  # fmt: skip
    return {
        "version": 1,
        "seeds": list(SEEDS),
        "samples": JUDGING,
        "training_seconds": round(seconds),
        "linear": linear(mnist, fashion),
        "frozen_batch_norm": frozen(),
        "averaging": averaging,
        "templates": templates,
        "stability": stability,
    }


def _matched(experts: Mapping[str, nn.Module], test: LabelledInputs) -> dict[str, float]:
    assert test.labels is not None
    models = list(experts.values())
    layer = find_classifier(models[0], test.batches[0])
    own = {name: run_split(expert, layer, test.batches) for name, expert in experts.items()}
    found = compare_templates(own, run_split(soup(models), layer, test.batches), test.labels)
    return {
        "expert_cosine": fmean(match.mean_cosine for match in found.experts.values()),
        "expert_top1": fmean(match.top1 for match in found.experts.values()),
        "merged_cosine": found.merged.mean_cosine,
        "retention": fmean(found.retention.values()),
    }


def linear(mnist: dict[str, Tensor], fashion: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Linear models on pixels, with and without strong decay: one set each, and both merged."""
    found: list[dict[str, Any]] = []
    for decay in (0.0, 0.1):
        rows: list[dict[str, float]] = []
        for seed in SEEDS:
            models: list[nn.Module] = []
            matched: list[Any] = []
            for data in (mnist, fashion):
                torch.manual_seed(seed)
                module = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
                x, y = data["x_train"], data["y_train"]
                models.append(_descend(module, x, y, seed=seed, decay=decay))
            merged = soup(models)
            for module, data in zip(models, (mnist, fashion), strict=True):
                x, y = [data["x_train"][:3000]], data["y_train"][:3000]
                own = {"own": run_split(module, "1", x)}
                matched.append(compare_templates(own, run_split(merged, "1", x), y))
            rows.append(
                {
                    "cosine": fmean(each.experts["own"].mean_cosine for each in matched),
                    "top1": fmean(each.experts["own"].top1 for each in matched),
                    "merged_cosine": fmean(e.to_parents["own"].mean_cosine for e in matched),
                    "merged_top1": fmean(each.to_parents["own"].top1 for each in matched),
                    "retention": fmean(each.retention["own"] for each in matched),
                    "smoothness": fmean(
                        smoothness(row, shape=(1, 16, 16))
                        for module in models
                        for row in module[1].weight.detach()  # pyright: ignore
                    ),
                    "accuracy": fmean(
                        accuracy(m, cut(d["x_test"], d["y_test"], 500))
                        for m, d in zip(models, (mnist, fashion), strict=True)
                    ),
                    "merged_accuracy": fmean(
                        accuracy(merged, cut(d["x_test"], d["y_test"], 500))
                        for d in (mnist, fashion)
                    ),
                }
            )
        found.append({"weight_decay": decay, **mean_of(rows)})
    return found


def _descend(module: nn.Module, x: Tensor, y: Tensor, *, seed: int, decay: float) -> nn.Module:
    """SGD with L2 (papers.md 3.2.1: 0.01, momentum 0.9, batch 64), 600 steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=decay)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.01 if step < 400 else 0.001
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return module.eval()


def frozen() -> list[dict[str, Any]]:
    """The demo's EfficientNet experts, trained with the base's statistics: re-estimated."""
    from mergewell.demo import vision
    from mergewell.models.loader import load_state
    from mergewell.storage.checkpoint import open_checkpoint

    base = open_checkpoint(vision.base_checkpoint_path())
    heads = vision.heads()
    models: dict[str, nn.Module] = {}
    for task in vision.TASKS:
        models[task] = vision.efficientnet_lite0()
        load_state(models[task], open_checkpoint(vision.task_vector_path(task), base=base))
    merged = soup(list(models.values()))
    found: list[dict[str, Any]] = []
    for task in vision.TASKS:
        images, labels = vision.load_images(task)
        half = len(images) // 2
        row: dict[str, Any] = {"task": task, "samples": half}
        for name, module in (("expert", models[task]), ("average", merged)):
            for mark in ("", "_reestimated"):
                judged = copy.deepcopy(module)
                if mark:
                    reestimate(judged, images[half:].split(128))
                with torch.inference_mode():
                    features = torch.cat([judged(part) for part in images[:half].split(125)])
                answers = vision.logits(features, heads[task]).argmax(-1)
                row[name + mark] = float((answers == labels[:half]).double().mean())
        found.append(row)
    return found


def tables(found: dict[str, Any]) -> str:
    lines: list[str] = []

    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines.append("| " + " | ".join(head) + " |")
        lines.append("|" + "---|" * len(head))
        lines.extend("| " + " | ".join(row) + " |" for row in rows)
        lines.append("")

    def p(row: Mapping[str, Any], key: str) -> str:
        return f"{100 * row[key]['mean']:.1f}" if key in row else ""

    head = ["net", "start", "K", "expert", "soup", "soup *", "REPAIR", "logits", "features, mean",
            "features, 1st", "greedy (kept)", "gap", "covariance", "cosine"]  # fmt: skip
    table(head, [
        [row["net"], row["start"], str(row["experts"]), p(row, "single"), p(row, "uniform_soup"),
         p(row, "uniform_soup_reestimated"), p(row, "repair"), p(row, "logit_ensemble"),
         p(row, "feature_ensemble_mean_head"), p(row, "feature_ensemble_first_head"),
         f"{p(row, 'greedy_soup')} ({row['greedy_kept']['mean']:.1f})", p(row, "nonlinearity"),
         p(row, "covariance"), f"{row['cosine']['mean']:.2f}"]
        for row in found["averaging"]
    ])  # fmt: skip
    table(["net", "start", "expert cosine", "top 1", "merged cosine", "retention"], [
        [row["net"], row["start"], *(f"{row[key]['mean']:.2f}" for key in
         ("expert_cosine", "expert_top1", "merged_cosine", "retention"))]
        for row in found["templates"]
    ])  # fmt: skip
    keys = [key for key in found["linear"][0] if key != "weight_decay"]
    table(["decay", *keys], [
        [str(row["weight_decay"]), *(f"{row[key]['mean']:.3f}" for key in keys)]
        for row in found["linear"]
    ])  # fmt: skip
    keys = [key for key in found["frozen_batch_norm"][0] if key != "task"]
    table(["task", *keys], [
        [row["task"], *(f"{row[key]:.3g}" for key in keys)] for row in found["frozen_batch_norm"]
    ])  # fmt: skip
    for curve in ("magnitude", "noise"):
        rows = [r for r in found["stability"] if r["curve"] == curve and r["which"] == "all"]
        amounts = sorted({row["amount"] for row in rows})
        groups: dict[tuple[str, ...], dict[float, str]] = {}
        for row in rows:
            key = (row["net"], row["batch_norm"], row["subject"])
            groups.setdefault(key, {})[row["amount"]] = (
                f"{100 * row['agreement']['mean']:.1f} / {100 * row['accuracy']['mean']:.1f}"
            )
        shown = [f"{amount:g}" for amount in amounts]
        table(
            ["net", "BatchNorm", curve, *shown],
            [[*key, *(cells[amount] for amount in amounts)] for key, cells in groups.items()],
        )
    return "\n".join(lines)


def written(found: Mapping[str, Any]) -> str:
    """JSON with four significant digits and a row a line."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(each) for key, each in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    parts: list[str] = []
    for key, content in found.items():
        if isinstance(content, list) and content and isinstance(content[0], dict):
            rows = ",\n  ".join(json.dumps(short(row)) for row in content)
            parts.append(f"{json.dumps(key)}: [\n  {rows}]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(content)}")
    return "{" + ",\n ".join(parts) + "}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = study(arguments.data)
    arguments.out.write_text(written(found), encoding="utf-8")
    print(tables(found))


if __name__ == "__main__":
    main()
