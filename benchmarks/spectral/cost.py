"""What spectral merges cost: time against their decompositions, and memory on a whole model.

    python benchmarks/spectral/cost.py time [--side 4096] [--experts 4] [--methods tsv iso_c]
    python benchmarks/spectral/cost.py memory --folder /tmp/mergewell-spectral [--size 1.5]
        [--layers N] [--experts 4] [--methods tsv iso_c] [--workers N] [--models FOLDER]

`time` merges one square matrix in float32, as a bfloat16 checkpoint's is, on one thread, and prints
the wall time, what of it passed inside of `linalg.svd`, and their ratio: done at 1.3 or less.

`memory` writes a Llama-shaped bfloat16 base and experts (3 GB each at size 1.5), merges them with
each method in a process of its own, and prints the peak of `RssAnon` in /proc/self/status, sampled
100 times a second, torch and Python included: done at 2000 MB or less. `--layers` writes a model
with fewer layers, whose matrices, and so the peak, are the same. The folder is removed. `--models`
merges models that benchmarks/speed/generate.py left (model0, model1, ...) and writes none.

Each row also goes to `--out`, docs/benchmarks/spectral.json, in the place of the one of the same
setting.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "speed"))

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "spectral.json"
SETTING = ("method", "side", "experts", "size", "layers", "workers")
"""What tells rows apart."""

_MERGE = """
import json, sys, threading, time
from pathlib import Path
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import run

def anonymous():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

recipe, out, workers = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]) or None
plan = make_plan(make_recipe(recipe))
before, peak, done = anonymous(), 0, threading.Event()

def sample():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous())

thread = threading.Thread(target=sample, daemon=True)
thread.start()
began, cpu = time.perf_counter(), time.process_time()
run(plan, out, workers=workers)
wall, cpu = time.perf_counter() - began, time.process_time() - cpu
done.set()
thread.join()
print(json.dumps({
    "wall_s": round(wall, 1), "cpu_s": round(cpu, 1), "peak_mb": round(peak / 1e6),
    "before_mb": round(before / 1e6),
}))
"""


def time_of(method: str, side: int, experts: int) -> dict[str, Any]:
    """Merge one matrix; return seconds, those inside of decompositions, and their ratio."""
    import torch

    from mergewell import linalg
    from mergewell.methods.base import METHODS
    from mergewell.tensor_group import TensorGroup

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(side, side, generator=generator)
    moved = tuple(
        base + 4e-4 * torch.randn(side, side, generator=generator) for _ in range(experts)
    )
    group = TensorGroup("layers.0.weight", moved, torch.ones(experts), base)
    inside, count, svd = 0.0, 0, linalg.svd

    def timed(
        matrix: torch.Tensor, how: linalg.Decomposition = "gram", *, rank: int | None = None
    ) -> linalg.Factors:
        nonlocal inside, count
        began = time.perf_counter()
        factors = svd(matrix, how, rank=rank)
        inside, count = inside + time.perf_counter() - began, count + 1
        return factors

    linalg.svd = timed
    try:
        began = time.perf_counter()
        METHODS.build(method, {}).merge(group)
        wall = time.perf_counter() - began
    finally:
        linalg.svd = svd
    return {
        "method": method, "side": side, "experts": experts, "wall_s": round(wall, 2),
        "svds": count, "svd_s": round(inside, 2), "ratio": round(wall / inside, 3),
    }  # fmt: skip


def memory_of(method: str, models: Sequence[Path], out: Path, workers: int) -> dict[str, Any]:
    """Merge a base and its experts; return seconds and the peak of memory."""
    shutil.rmtree(out, ignore_errors=True)
    recipe = {
        "base": str(models[0]),
        "experts": [{"path": str(path)} for path in models[1:]],
        "method": {"name": method},
    }
    done = subprocess.run(
        [sys.executable, "-c", _MERGE, json.dumps(recipe), str(out), str(workers)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    shutil.rmtree(out)
    return {"method": method, "experts": len(models) - 1, **json.loads(done.stdout)}


def keep(out: Path, what: str, row: dict[str, Any]) -> None:
    """Print a row and put it into the file of the page's figures."""
    print(json.dumps(row), flush=True)
    known = (
        json.loads(out.read_text()) if out.is_file() else {"version": 1, "time": [], "memory": []}
    )
    own = [row.get(key) for key in SETTING]
    known[what] = [r for r in known[what] if [r.get(key) for key in SETTING] != own] + [row]
    out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mergewell-spectral"))
    parser.add_argument("--size", default="1.5")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    if given.what == "time":
        for method in given.methods or ["tsv", "iso_c", "iso_cts"]:
            keep(given.out, "time", time_of(method, given.side, given.experts))
        return
    import generate

    if given.layers is not None:
        hidden, inner, _, vocabulary, narrow = generate.SIZES[given.size]
        generate.SIZES[given.size] = (hidden, inner, given.layers, vocabulary, narrow)
    models = [(given.models or given.folder) / f"model{i}" for i in range(given.experts + 1)]
    try:
        for index, path in enumerate(models):
            if given.models is None:
                generate.write_model(path, given.size, index)
        for method in given.methods or ["tsv", "iso_c"]:
            row = memory_of(method, models, given.folder / f"out-{method}", given.workers)
            told = {"size": given.size, "layers": generate.SIZES[given.size][2]}
            keep(given.out, "memory", {**row, **told, "workers": given.workers})
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
