"""Quality of merges: every method on real experts, tuned on equal budgets with and without labels.

    python benchmarks/quality/run.py --data DATA [--only vision text language] [--seeds 0 1 2]
        [--methods NAME ...] [--train] [--retry] [--redo]

Each finished row is appended to `results/BENCHMARK.jsonl`, so a killed run goes on where it was;
rows with an error are tried again with --retry, all rows of the methods named with --redo. Methods
are found by name: what is not in `spaces.py` is searched by the default space. --train first
trains the experts that the seeds ask for and the cache lacks.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import Benchmark, Judge, Scores, score, shown
from book import Book, Row, chosen
from judged import judged, mean
from merging import Merges
from spaces import LEFT_OUT, Candidate, candidates
from torch import Tensor, nn

from mergewell.learners.base import LEARNERS
from mergewell.methods.base import METHODS
from mergewell.models.ensemble import ensemble_outputs
from mergewell.models.loader import load_state

BENCHMARKS = {"vision": "on_vision", "text": "on_text", "language": "on_language"}
RESULTS = Path(__file__).parent / "results"
FIRST = ("task_arithmetic", "average", "ties", "tsv", "iso_c", "regmean", "wudi", "cart", "iso_cts")
"""Run before the others: the first two are what all are compared with."""
COMPARED = "task_arithmetic"
"""Tuned with labels, the method that gains are counted from."""
HELD = 8
"""Batches of which all experts' logits are held at a time."""


class Bench:
    """One benchmark and seed: its judge, its merges and its rows."""

    def __init__(self, benchmark: Benchmark, book: Book, folder: Path) -> None:
        self.of, self.book = benchmark, book
        self._scores = folder / "scores" / f"{benchmark.name}.{benchmark.seed}"
        self.judge = Judge(benchmark)
        self.merges = Merges(benchmark, folder, self._metric)
        self.commit = commit()
        self.own: Scores = {}

    def prepare(self) -> None:
        """Judge base, experts and ensemble unless they are known; keep what tuning compares with.

        The label-free choice looks at the experts' outputs on the unlabelled inputs only.
        """
        self.judge.learn_references(lambda task: self._load(self.merges.expert(task)))
        names = ["base", *self.of.experts, "ensemble"]
        if any(self._kept(name) is None for name in names):
            for name, scores in self._reference_scores().items():
                self._keep(name, scores)
        scores = {name: self._kept(name) for name in names}
        self.own = {task: scores[task][task] for task in self.of.experts}
        for name, found in {**scores, "experts": self.own}.items():
            row = {"kind": "reference", "seed": self.of.seed, "method": name}
            if self.book.known(row) is None:
                self.book.add({**row, **judged(self.of.metric, found, self.own, {})})

    def run(self, name: str, *, retry: bool, redo: bool) -> None:
        """Try all candidates of one method, then judge the chosen ones on the test examples."""
        tried: list[Row] = []
        for candidate in candidates(name):
            row = self._row("candidate", name, candidate)
            known = self.book.known(row)
            if known is None or redo or (retry and "error" in known):
                known = self._add(row, self._tried(name, candidate))
            if "error" not in known:
                tried.append(known)
        done: list[Candidate] = []
        for row in chosen(tried) if tried else ():
            candidate = Candidate(row["parameters"], row["scale"])
            row = self._row("test", name, candidate)
            if candidate not in done and (redo or self.book.known(row) is None):
                by_labels = name == COMPARED and not done  # the first of the two
                self._add(row, self._tested(name, candidate, keep=by_labels))
            done.append(candidate)

    def _tried(self, name: str, candidate: Candidate) -> Row:
        began = time.process_time()
        try:
            self._load(self.merges.merged(name, candidate))
        except Exception as error:  # whatever is wrong is a row and not the end of the run
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        merging = time.process_time() - began
        scores = self.judge.scores(self.of.validation)
        if not all(np.isfinite(task).all() for task in scores.values()):
            return {"error": "the merge's outputs are not finite"}
        return {
            "score": mean(scores), "validation": shown(self.of.metric, mean(scores)),
            **self._without_labels(name, candidate),
            "merge_s": merging, "cpu_s": time.process_time() - began,
        }  # fmt: skip

    def _without_labels(self, name: str, candidate: Candidate) -> dict[str, float]:
        """Return the measures that choose without labels, never on inputs the merge was made of."""
        if not self.merges.uses_inputs(name, candidate.parameters):
            return self.judge.without_labels(held_out=False)
        self._load(self.merges.merged(name, candidate, half=True))
        return self.judge.without_labels(held_out=True)

    def _tested(self, name: str, candidate: Candidate, *, keep: bool) -> Row:
        began = time.process_time()
        self._load(self.merges.merged(name, candidate))
        scores = self.judge.scores(self.of.test)
        if keep:
            self._keep(name, scores)
        return {**self.judged(scores), "cpu_s": time.process_time() - began}

    def judged(self, scores: Scores) -> Row:
        """Return what is reported of test scores, with the gains over ensemble and `COMPARED`."""
        others = {n: s for n in ("ensemble", COMPARED) if (s := self._kept(n)) is not None}
        return judged(self.of.metric, scores, self.own, others)

    def _row(self, kind: str, name: str, candidate: Candidate) -> Row:
        return {
            "kind": kind, "seed": self.of.seed, "method": name,
            "parameters": dict(candidate.parameters), "scale": candidate.scale,
        }  # fmt: skip

    def _add(self, row: Row, found: Row) -> Row:
        say(f"{self.of.name} {row} {found}")
        return self.book.add({**row, **found, "commit": self.commit})

    def _metric(self, module: nn.Module) -> float:
        """Return the validation score of a module that a learner asks about."""
        self._load(module.state_dict())
        return mean(self.judge.scores(self.of.validation))

    def _load(self, state: Mapping[str, Tensor]) -> None:
        load_state(self.judge.module, state)

    def _reference_scores(self) -> dict[str, Scores]:
        """Return the test scores of the base, of every expert and of their logit ensemble."""
        self._load(self.merges.base)
        found = {"base": self.judge.scores(self.of.test)}
        module, states = self.judge.module, {}
        for task in self.of.experts:
            self._load(self.merges.expert(task))
            states[task] = {name: t.clone() for name, t in module.state_dict().items()}
        found |= {name: {} for name in (*states, "ensemble")}
        for task, part in self.of.test.items():
            rows: dict[str, list[Any]] = {name: [] for name in (*states, "ensemble")}
            for start in range(0, len(part.batches), HELD):
                labels = part.labels[start : start + HELD]
                some = replace(part, batches=part.batches[start : start + HELD], labels=labels)
                outputs: dict[str, list[Tensor]] = {}
                for name, state in states.items():
                    module.load_state_dict(state)
                    outputs[name] = list(self.judge.outputs(task, some))
                together = zip(*outputs.values(), strict=True)
                outputs["ensemble"] = [ensemble_outputs(logits, "logits") for logits in together]
                for name, logits in outputs.items():
                    pairs = zip(logits, labels, strict=True)
                    rows[name] += [score(self.of.metric, *pair) for pair in pairs]
            for name, parts in rows.items():
                found[name][task] = np.concatenate(parts)
        return found

    def _kept(self, name: str) -> Scores | None:
        path = self._scores / f"{name}.npz"
        if not path.exists():
            return None
        with np.load(path) as kept:
            return {task: kept[task] for task in self.of.experts}

    def _keep(self, name: str, scores: Scores) -> None:
        self._scores.mkdir(parents=True, exist_ok=True)
        np.savez(self._scores / f"{name}.npz", **scores)


def methods_of(names: list[str] | None) -> list[str]:
    """Return the methods and learners to run, the ones to compare with first."""
    every = [*METHODS.names(), *LEARNERS.names()]
    for name in names or ():
        if name not in every:
            raise SystemExit(f"There is no method or learner {name!r}.")
    wanted = [name for name in every if name not in LEFT_OUT and (not names or name in names)]
    return sorted(wanted, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def cache_folder() -> Path:
    """Return where trained experts, calibrations and scores are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mergewell" / "quality"


def commit() -> str:
    """Return the commit that the code is near to."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def say(text: str) -> None:
    """Report progress."""
    print(f"[{time.process_time():.0f} CPU s] {text}", file=sys.stderr, flush=True)


def train(module: Any, data: Path, folder: Path, seed: int) -> None:
    """Train the experts of one seed that are not there."""
    for task in module.TASKS:
        path = module.expert_path(data, folder, task, seed)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            module.train(data, path, task, seed)
            say(f"trained {path}")


def main() -> None:
    """Run the benchmarks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--redo", action="store_true")
    given = parser.parse_args()
    if given.redo and not given.methods:
        parser.error("--redo needs --methods")
    torch.set_num_threads(1)
    os.environ["MERGEWELL_WORKERS"] = "1"
    for name in given.only:
        module = importlib.import_module(BENCHMARKS[name])
        for seed in given.seeds:
            if given.train:
                train(module, given.data, given.cache, seed)
            book = Book(given.results / f"{name}.jsonl")
            bench = Bench(module.benchmark(given.data, given.cache, seed), book, given.cache)
            bench.prepare()
            for method in methods_of(given.methods):
                bench.run(method, retry=given.retry, redo=given.redo)


if __name__ == "__main__":
    main()
