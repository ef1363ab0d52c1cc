"""What merges cost beside copying the files: floor, mergewell and (once each) mergekit, in one run.

    python benchmarks/speed/bench.py --sizes 0.1 0.5 1.5 --runs 5 --mergekit /path/to/mergekit-venv

The floor reads all inputs (`cat > /dev/null`) and writes the output (`cp`), here as there to tmpfs.
Floor and mergewell take turns, so that drift of a shared machine meets both; the ratio is that of
each pair. mergekit runs on the 0.5 set only. Imports and the loading of compiled code (by a merge
of one small tensor) are timed apart (`start_s`) and not counted.
Memory is the peak of anonymous memory above that after the imports. Writes docs/benchmarks/speed.md
and speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # name: our method, mergekit's configuration, experts
    "linear": ({"name": "average"}, {"merge_method": "linear"}, 4),
    "task_arithmetic": (
        {"name": "task_arithmetic", "scale": 0.4},
        {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.4}},
        4,
    ),
    "slerp": ({"name": "slerp", "t": 0.4}, {"merge_method": "slerp", "parameters": {"t": 0.4}}, 2),
    "ties": (
        {"name": "ties", "density": 0.2},
        {"merge_method": "ties", "parameters": {"density": 0.2}},
        4,
    ),
    "dare_ties": (
        {"name": "dare", "density": 0.5},
        {"merge_method": "dare_ties", "parameters": {"density": 0.5}},
        4,
    ),
    "della": (
        {"name": "della", "density": 0.5, "epsilon": 0.15},
        {"merge_method": "della", "parameters": {"density": 0.5, "epsilon": 0.15}},
        4,
    ),
    "breadcrumbs": (
        {"name": "breadcrumbs", "density": 0.2, "gamma": 0.01},
        {"merge_method": "breadcrumbs_ties", "parameters": {"density": 0.2, "gamma": 0.01}},
        4,
    ),
    "sce": (
        {"name": "sce", "density": 0.2},
        {"merge_method": "sce", "parameters": {"select_topk": 0.2}},
        4,
    ),
    "model_stock": ({"name": "model_stock"}, {"merge_method": "model_stock"}, 4),
}

_HARD = ("ties", "dare_ties", "della", "breadcrumbs", "sce")

CHILD = """
import json, resource, sys, threading, time
began = time.perf_counter()
import torch
import mergewell.kernels.ops
from pathlib import Path
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import run

def anonymous():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

recipe, out = json.loads(sys.argv[1]), sys.argv[2]

def warm(folder):  # a merge of one small tensor loads the compiled code that this method needs
    from safetensors.torch import save_file
    paths = [str(folder / f"{i}.safetensors") for i in range(1 + len(recipe["experts"]))]
    for i, path in enumerate(paths):
        save_file({"w": (torch.arange(40_000.0) * (1 + i / 64)).bfloat16().view(200, 200)}, path)
    small = {**recipe, "experts": [{"path": path} for path in paths[1:]]}
    small |= {"base": paths[0]} if "base" in recipe else {}
    run(make_plan(make_recipe(small)), folder / "out")

import tempfile
with tempfile.TemporaryDirectory() as folder:
    warm(Path(folder))
start = time.perf_counter() - began
before, peak, done = anonymous(), 0, threading.Event()

def sample():
    global peak
    while not done.wait(0.01):
        peak = max(peak, anonymous())

thread = threading.Thread(target=sample, daemon=True)
thread.start()
cpu, wall = time.process_time(), time.perf_counter()
run(make_plan(make_recipe(recipe)), out)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
done.set()
thread.join()
peak_mb = (peak - before) / 1e6
print(json.dumps({"start_s": start, "wall_s": wall, "cpu_s": cpu, "peak_mb": peak_mb}))
"""


def floor(inputs: list[Path], out: Path) -> float:
    """Return the seconds that reading all inputs and writing the output take."""
    files = [str(folder / "model.safetensors") for folder in inputs]
    began = time.perf_counter()
    with Path("/dev/null").open("wb") as sink:
        subprocess.run(["cat", *files], stdout=sink, check=True)
    subprocess.run(["cp", files[0], str(out)], check=True)
    seconds = time.perf_counter() - began
    out.unlink()
    return seconds


def ours(recipe: dict[str, Any], out: Path) -> dict[str, float]:
    """Return what one merge took."""
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(recipe), str(out)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    shutil.rmtree(out)
    return json.loads(ran.stdout)


def theirs(venv: Path, config: dict[str, Any], inputs: list[Path], out: Path) -> dict[str, float]:
    """Return what mergekit took, start-up and all."""
    base, *experts = map(str, inputs)
    data = {**config, "dtype": "bfloat16"}
    if config["merge_method"] == "slerp":
        data |= {"base_model": experts[0], "models": [{"model": e} for e in experts]}
    else:
        data["models"] = [{"model": e, "parameters": {"weight": 1.0}} for e in experts]
        data |= {} if config["merge_method"] == "linear" else {"base_model": base}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(data, file)
        file.flush()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        command = [str(venv / "bin" / "mergekit-yaml"), file.name, str(out), "--no-copy-tokenizer"]
        subprocess.run(command, capture_output=True, check=True)
        wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(out)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu}


def measure(
    name: str, size: str, arguments: argparse.Namespace, models: list[Path]
) -> dict[str, Any]:
    """Return the row of one method: medians over paired runs."""
    recipe, config, experts = METHODS[name]
    inputs = models[: experts + 1]
    data = {"experts": [{"path": str(p)} for p in inputs[1:]], "method": recipe}
    read = inputs
    if name in ("linear", "slerp"):
        read = inputs[1:]  # neither reads the base
    else:
        data["base"] = str(inputs[0])
    scratch = Path(arguments.scratch)
    floor(read, scratch / "floor")
    floors, merges = [], []
    for _ in range(arguments.runs):
        floors.append(floor(read, scratch / "floor"))
        merges.append(ours(data, scratch / "ours"))
    row: dict[str, Any] = {"method": name, "size": size, "experts": experts, "runs": len(floors)}
    one = (inputs[1] / "model.safetensors").stat().st_size
    row["gigabytes"] = (len(read) + 1) * one / 1e9  # read once and written
    row["floor_s"] = statistics.median(floors)
    for key in ("wall_s", "cpu_s", "peak_mb", "start_s"):
        row[key] = statistics.median(merge[key] for merge in merges)
    pairs = [merge["wall_s"] / base for merge, base in zip(merges, floors, strict=True)]
    row["ratio"] = statistics.median(pairs)
    row["ratio_low"], row["ratio_high"] = min(pairs), max(pairs)
    if arguments.mergekit and size == "0.5":
        peer = theirs(Path(arguments.mergekit), config, inputs, scratch / "theirs")
        row |= {"mergekit_wall_s": peer["wall_s"], "mergekit_cpu_s": peer["cpu_s"]}
    print(json.dumps(row), flush=True)
    return row


def page(rows: list[dict[str, Any]], load: str) -> str:
    """Return the table as Markdown."""
    lines = [
        "# Speed", "",
        "Made by `make bench-speed` (`benchmarks/speed/bench.py` says what is measured and how).",
        f"Two cores, load average at the start and end: {load}. Medians of paired runs; the ratio",
        "is wall time over that of reading all inputs and writing the output, range in brackets.",
        "mergekit ran once a method, its start-up (about 5 CPU seconds) included.", "",
        "| method | 1e9 parameters | floor s | wall s | ratio to floor | CPU s | CPU s a GB "
        "| peak MB | start s | mergekit wall s | mergekit CPU s | CPU times less |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        peer = row.get("mergekit_cpu_s")
        lines.append(
            f"| {row['method']} | {row['size']} | {row['floor_s']:.2f} | {row['wall_s']:.2f} | "
            f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] | "
            f"{row['cpu_s']:.2f} | {row['cpu_s'] / row['gigabytes']:.2f} | "
            f"{row['peak_mb']:.0f} | {row['start_s']:.1f} | "
            + (f"{row['mergekit_wall_s']:.0f} | {peer:.0f} | " if peer else "– | – | ")
            + (f"{peer / row['cpu_s']:.0f} |" if peer else "– |")
        )
    over = [row for row in rows if row["ratio"] > (3.0 if row["method"] in _HARD else 2.0)]
    lines += [
        "",
        "Targets are a ratio of 2.0, and of 3.0 for trimming, dropping and ranking methods.",
    ]
    if over:
        names = ", ".join(f"{row['method']} at {row['size']}" for row in over)
        lines.append(f"Missed here: {names}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=["0.5"], choices=["0.1", "0.5", "1.5"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument(
        "--models", type=Path, default=Path("/tmp/mergewell-speed"),
        help="folder of SIZE/model0 ... ; made if absent",
    )  # fmt: skip
    parser.add_argument("--scratch", default="/dev/shm", help="where results go: a tmpfs")
    parser.add_argument("--mergekit", default="", help="virtual environment that has mergekit")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    arguments = parser.parse_args()
    before = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        folder = arguments.models / size
        make = [sys.executable, str(Path(__file__).parent / "generate.py"), "--out", str(folder)]
        subprocess.run([*make, "--size", size], check=True, stdout=sys.stderr)
        models = [folder / f"model{index}" for index in range(5)]
        rows += [measure(name, size, arguments, models) for name in arguments.methods]
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = arguments.out / "speed.json"
    kept = json.loads(known.read_text())["rows"] if known.exists() else []
    new = {(row["method"], row["size"]) for row in rows}
    rows = [row for row in kept if (row["method"], row["size"]) not in new] + rows
    order = list(METHODS)
    rows.sort(key=lambda row: (float(row["size"]), order.index(row["method"])))
    known.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    load = f"{before:.1f}, {os.getloadavg()[0]:.1f}"
    (arguments.out / "speed.md").write_text(page(rows, load))


if __name__ == "__main__":
    main()
