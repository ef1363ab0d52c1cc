"""Merges of FusionBench (fusion-bench 0.2.33) on the same experts, in the settings that ours chose.

    python -m venv .venv-public && .venv-public/bin/pip install fusion-bench==0.2.33 -e '.[demo]'
    .venv-public/bin/python benchmarks/quality/public.py --data DATA --only text vision

Run after `run.py`. Each of its algorithms gets the modules as they are, as its users would call it,
at the parameters and the scale that our tuning with labels chose for the same method, and is judged
on the same test examples. A row, kind "public", says the accuracy, the CPU seconds of the merge,
and how far the merged task vector is from ours: ||theirs - ours|| / ||ours|| over the tensors that
their code treats as matrices (two dimensions), and over the others.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from book import Book, Row, chosen
from fusion_bench import BaseModelPool
from fusion_bench.method.isotropic_merging.iso import (
    ISO_C_Merge,
    ISO_CTS_Merge,
)
from fusion_bench.method.magmax import MagMaxAlgorithm
from fusion_bench.method.model_stock import ModelStock
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
from fusion_bench.method.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.wudi.wudi import WUDIMerging
from run import BENCHMARKS, RESULTS, Bench, cache_folder, say
from spaces import Candidate
from torch import Tensor, nn

from mergewell.models.loader import load_state

Parameters = Mapping[str, Any]

PUBLIC: Mapping[str, Callable[[Parameters], Any]] = {
    "task_arithmetic": lambda p: TaskArithmeticAlgorithm(scaling_factor=1.0),
    "ties": lambda p: TiesMergingAlgorithm(
        scaling_factor=1.0, threshold=p["density"], remove_keys=[], merge_func="mean"
    ),
    "magmax": lambda p: MagMaxAlgorithm(scaling_factor=1.0),
    "model_stock": lambda p: ModelStock(),
    "tsv": lambda p: TaskSingularVectorMerging(),
    "iso_c": lambda p: ISO_C_Merge(scaling_factor=1.0),
    "iso_cts": lambda p: ISO_CTS_Merge(scaling_factor=1.0, common_space_fraction=p["common"]),
    "wudi": lambda p: WUDIMerging(iter_num=300),
}
"""Our parameters to their algorithm; the scale is put on afterwards, as with ours."""


def merged(bench: Bench, name: str, parameters: Parameters) -> dict[str, Tensor]:
    """Return the weights that the public implementation merges, in float32."""
    models = {"_pretrained_": module_of(bench, bench.merges.base)}
    for task in bench.of.experts:
        models[task] = module_of(bench, bench.merges.expert(task))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = PUBLIC[name](parameters).run(BaseModelPool(models))
    return {key: tensor.detach().clone() for key, tensor in result.state_dict().items()}


def module_of(bench: Bench, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a module of its own with these weights; whole numbers among its buffers as floats.

    Some of the algorithms refuse whole numbers, which would be all that the column says.
    """
    module = bench.of.factory()
    load_state(module, state)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, buffer.float())
    return module.float().eval()


def distances(bench: Bench, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Row:
    """Return the relative distance of the merged task vectors, matrices and the rest apart."""
    sums = {"matrices": [0.0, 0.0], "others": [0.0, 0.0]}
    for name, base in bench.merges.base.items():
        if not base.is_floating_point() or name not in ours or name not in theirs:
            continue
        part = sums["matrices" if base.ndim == 2 else "others"]
        part[0] += float((theirs[name] - ours[name]).double().square().sum())
        part[1] += float((ours[name] - base).double().square().sum())
    return {name: (a / b) ** 0.5 if b else 0.0 for name, (a, b) in sums.items()}


def run(bench: Bench, name: str, *, redo: bool) -> None:
    """Judge the public implementation in the setting that our tuning with labels chose."""
    tried = [
        row
        for row in bench.book.rows.values()
        if row["kind"] == "candidate"
        and (row["method"], row["seed"]) == (name, bench.of.seed)
        and "error" not in row
    ]
    if not tried:
        say(f"{name}: ours has not been run")
        return
    pick = chosen(tried)[0]
    row: Row = {
        "kind": "public", "seed": bench.of.seed, "method": name,
        "parameters": pick["parameters"], "scale": pick["scale"],
    }  # fmt: skip
    if bench.book.known(row) is not None and not redo:
        return
    began = time.process_time()
    try:
        theirs = merged(bench, name, pick["parameters"])
    except Exception as error:  # what it cannot do is a result
        found: Row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    else:
        seconds = time.process_time() - began
        candidate = Candidate(pick["parameters"], 1.0)
        apart = distances(bench, bench.merges.merged(name, candidate), theirs)
        scaled = {
            key: torch.lerp(bench.merges.base[key], tensor, pick["scale"])
            if tensor.is_floating_point() and key in bench.merges.base
            else tensor
            for key, tensor in theirs.items()
        }
        load_state(bench.judge.module, scaled)
        scores = bench.judge.scores(bench.of.test)
        found = {**bench.judged(scores), "merge_s": seconds, "apart": apart}
    version = importlib.metadata.version("fusion-bench")
    found["source"] = f"fusion-bench {version}"
    say(f"{bench.of.name} {name} {found}")
    bench.book.add({**row, **found, "commit": bench.commit})


def main() -> None:
    """Run what is public beside ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=["text", "vision"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", choices=PUBLIC, default=list(PUBLIC))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--redo", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.only:
        module = importlib.import_module(BENCHMARKS[name])
        for seed in given.seeds:
            book = Book(given.results / f"{name}.jsonl")
            bench = Bench(module.benchmark(given.data, given.cache, seed), book, given.cache)
            bench.prepare()
            for method in given.methods:
                run(bench, method, redo=given.redo)


if __name__ == "__main__":
    main()
