"""Routers of low-rank experts on 8 image tasks, beside the merge, the ensemble and the experts.

    python benchmarks/routing/vision.py --data /work/shared/data --folder /tmp/mergewell-routing \
        --out benchmarks/routing/vision.csv [--images 400]

EfficientNet-Lite0 and the 8 experts of `DATA/experts_vision`; heads are frozen and shared
(benchmarks/quality/on_vision.py). Merges the experts, writes `smile` and `mass` companions beside
it and judges the modules that `mergewell.routing` makes on `--images` test images a task, in
float32, one thread, batches of one task. Nothing is tuned on these images: settings are defaults
and the variants that are listed. A file that was begun is gone on with.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "quality"))

import on_vision

from mergewell.companions.base import Companion, write_companion
from mergewell.companions.mass import Mass
from mergewell.companions.smile import Smile
from mergewell.demo import vision
from mergewell.models.dataflow import evaluating
from mergewell.models.loader import load_state
from mergewell.plan import Plan, make_plan
from mergewell.recipe import make_recipe
from mergewell.routing.load import route
from mergewell.run import run
from mergewell.storage.checkpoint import open_checkpoint

RULES = [
    {"match": match, "method": on_vision.KEEP}
    for match in ("_fc.*", "*.running_*", "*.num_batches_tracked")
]
LAST = "_conv_head.weight"
CASES: Mapping[str, tuple[str, Companion | None]] = {
    "average": ("average", None),
    "tsv": ("tsv", None),
    "smile, rank 8": ("average", Smile(rank=8, router_rank=4)),
    "smile": ("average", Smile()),
    "smile, per sample": ("average", Smile(per="sample")),
    "smile, rank 64, per sample": ("average", Smile(rank=64, per="sample")),
    "smile, on tsv, per sample": ("tsv", Smile(per="sample")),
    "mass, all layers": ("tsv", Mass()),
    "mass, last layer": ("tsv", Mass(at=LAST)),
    "mass, all layers, one expert": ("tsv", Mass(most=1)),
    "mass, all layers, one of full rank": ("tsv", Mass(most=1, density=1.0)),
}  # fmt: skip


def planned(data: Path, method: str) -> Plan:
    """The plan of a merge of the 8 experts."""
    experts = [data / "experts_vision" / f"{task}.delta8.safetensors" for task in on_vision.TASKS]
    recipe = {
        "base": str(vision.base_checkpoint_path()), "method": {"name": method}, "rules": RULES,
        "experts": [{"path": str(path)} for path in experts],
    }  # fmt: skip
    return make_plan(make_recipe(recipe))


def routed(data: Path, folder: Path, method: str, companion: Companion | None) -> dict[str, Any]:
    """Make a merge and its router; return the module and what it cost."""
    plan, merged = planned(data, method), folder / method
    if not merged.exists():
        run(plan, merged, workers=1)
    module = vision.efficientnet_lite0()
    own = sum(tensor.numel() for tensor in module.state_dict().values())
    if companion is None:
        load_state(module, open_checkpoint(merged))
        return {"module": module}
    began = time.process_time()
    path = folder / "now.companion.safetensors"
    write_companion(companion, plan, on_vision.TASKS, path)
    written, began = time.process_time() - began, time.process_time()
    made = route(module, merged, companion=path)
    return {
        "module": made.module, "layers": made.layers, "parameters": made.parameters / own,
        "passes": made.passes, "added": made.added, "written_s": written,
        "loaded_s": time.process_time() - began, "file_mb": path.stat().st_size / 1e6,
    }  # fmt: skip


def judged(
    module: Callable[[Tensor], Tensor] | Mapping[str, nn.Module],
    tests: Mapping[str, tuple[Tensor, Tensor, Tensor]],
) -> tuple[dict[str, float], float]:
    """Accuracy by task and CPU milliseconds an image."""
    found: dict[str, float] = {}
    began, count = time.process_time(), 0
    for task, (images, labels, head) in tests.items():
        one: Any = module[task] if isinstance(module, Mapping) else module
        right = 0
        for x, y in zip(images.split(100), labels.split(100), strict=True):
            right += int((vision.logits(one(x), head).argmax(-1) == y).sum())
        found[task], count = right / len(labels), count + len(labels)
    return found, 1000 * (time.process_time() - began) / count


def choices(
    router: Any, tests: Mapping[str, tuple[Tensor, Tensor, Tensor]]
) -> dict[str, tuple[float, float]]:
    """Share of a task's samples whose choice holds its expert, and experts chosen on average."""
    told: dict[str, tuple[float, float]] = {}
    for row, (task, (images, _, _)) in enumerate(tests.items()):
        found = router.choices(images[:100])
        told[task] = fmean(row in choice for choice in found), fmean(len(c) for c in found)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=400)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    if given.out.is_file():
        with given.out.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    base = on_vision.base_module()
    tests: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for task in on_vision.TASKS:
        array = on_vision.arrays(given.data, task)
        picked = torch.randperm(
            len(array["y_test"]), generator=torch.Generator().manual_seed(0)
        )[: given.images].numpy()  # fmt: skip
        x = vision.prepare(on_vision.images(array, "test", picked))
        x = x.contiguous(memory_format=torch.channels_last)
        labels = torch.from_numpy(array["y_test"][picked].astype("int64"))
        tests[task] = x, labels, on_vision.head(base, array)
    experts: dict[str, nn.Module] = {}
    plan = planned(given.data, "average")
    for task, checkpoint in zip(on_vision.TASKS, plan.experts, strict=True):
        experts[task] = vision.efficientnet_lite0()
        load_state(experts[task], checkpoint)
    fixed: dict[str, Any] = {"base": base, "experts": experts}
    for name in [*fixed, *CASES]:
        if any(row["model"] == name for row in rows):
            continue
        made = {"module": fixed[name]} if name in fixed else routed(
            given.data, given.folder, *CASES[name]
        )  # fmt: skip
        module = made.pop("module")
        every = list(module.values()) if isinstance(module, dict) else [module]
        with evaluating(every):
            accuracy, spent = judged(module, tests)
            told = choices(module, tests) if name.startswith("mass") else {}
        row = {
            "model": name, "mean": fmean(accuracy.values()), **accuracy, "ms_an_image": spent,
            **{key: made.get(key, "") for key in (
                "layers", "parameters", "passes", "added", "written_s", "loaded_s", "file_mb"
            )},
            "holds_own": fmean(h for h, _ in told.values()) if told else "",
            "chosen": fmean(c for _, c in told.values()) if told else "",
        }  # fmt: skip
        rows.append({k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()})
        print(rows[-1], flush=True)
        with given.out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
