"""Does guiding a merge by M-Loss help? M-TIES against its controls on two real benchmarks.

    python benchmarks/m_loss/study.py --data DATA --out docs/studies/m_loss.json

DATA holds `vision_data/TASK.npz`, `text/TASK.{train,test}.csv.gz` with `meta.json`, and
`experts_minilm/TASK.delta8.safetensors`; the vision experts come with the package. Density and
scale are chosen on validation examples (of TIES and of guided M-TIES, by equal grids), the
controls take those of the guided merge, and everything is judged on other examples.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mergewell.calibration.collect import calibrate
from mergewell.calibration.data import Data
from mergewell.calibration.file import write_calibration
from mergewell.demo import text, vision
from mergewell.evaluate import EvaluationTask, estimate, resampled_means
from mergewell.guidance import open_guidance
from mergewell.methods.ops import GuidedMerge
from mergewell.models.dataflow import Batch
from mergewell.models.loader import load_state
from mergewell.plan import Plan, make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors

SEEDS = (0, 1, 2)
"""Of the calibration samples, and of the random places."""
DENSITIES, SCALES, SPREAD = (0.1, 0.2, 0.4, 0.8), (1.0, 1.5, 2.0), 0.1
STRONG = (0.1, 0.2)
"""Density and spread of a second setting: rows keep from nothing to 0.2."""
CALIBRATION = 16
"""Unlabelled training inputs a task."""
VISION_VALIDATION, VISION_TEST = 150, 800
TEXT_TASKS = ("agnews", "banking77", "snips", "sst2", "subj", "tweet_emotion")
TEXT_VALIDATION, TEXT_TEST = 80, 300

Scores = list[np.ndarray[Any, np.dtype[np.float64]]]
"""Right or wrong, by task and example."""


@dataclass(frozen=True)
class Benchmark:
    """Experts of one base, the inputs to measure them on and the examples to judge them on."""

    name: str
    base: Path
    experts: Mapping[str, Path]
    factory: Callable[[], nn.Module]
    validation: Sequence[EvaluationTask]
    test: Sequence[EvaluationTask]
    inputs: Callable[[int], Sequence[Batch]]
    rules: Sequence[Mapping[str, Any]] = ()


def vision_benchmark(data: Path) -> Benchmark:
    """Return the packaged EfficientNet-Lite0 experts with images of the full sets."""
    heads = vision.heads()
    parts: tuple[list[EvaluationTask], list[EvaluationTask]] = ([], [])
    arrays = {task: np.load(data / "vision_data" / f"{task}.npz") for task in vision.TASKS}
    for task, array in arrays.items():
        order = np.random.default_rng(0).permutation(len(array["y_test"]))
        stop = VISION_VALIDATION + VISION_TEST
        cuts = order[:VISION_VALIDATION], order[VISION_VALIDATION:stop]
        for part, picked in zip(parts, cuts, strict=True):
            images = vision.prepare(_images(array, "test", picked))
            labels = torch.from_numpy(array["y_test"][picked]).long()
            batches = tuple(images.split(vision.BATCH))
            head = partial(vision.logits, head=heads[task])
            part.append(EvaluationTask(task, batches, labels, head, task))

    def inputs(seed: int) -> Sequence[Tensor]:
        generator = np.random.default_rng(100 + seed)
        return [
            vision.prepare(
                _images(a, "train", generator.permutation(len(a["y_train"]))[:CALIBRATION])
            )
            for a in arrays.values()
        ]

    experts = {task: vision.task_vector_path(task) for task in vision.TASKS}
    return Benchmark(
        "EfficientNet-Lite0, 4 image tasks", vision.base_checkpoint_path(), experts,
        vision.efficientnet_lite0, *parts, inputs,
        rules=({"match": "_fc.*", "method": {"name": "keep", "model": 0}},),
    )  # fmt: skip


def _images(array: Any, split: str, picked: Any) -> Tensor:
    if f"x_{split}" in array:
        return torch.from_numpy(array[f"x_{split}"][picked]).unsqueeze(1).expand(-1, 3, -1, -1)
    jpeg = torch.from_numpy(array[f"jpeg_{split}"])
    offsets = torch.from_numpy(array[f"off_{split}"].astype(np.int64))
    return torch.cat([vision.decode(jpeg, offsets[i : i + 2]) for i in picked])


def text_benchmark(data: Path) -> Benchmark:
    """Return the MiniLM experts with texts of the full sets; heads are embedded class names."""
    meta = json.loads((data / "text" / "meta.json").read_text())
    base = text.encoder()
    parts: tuple[list[EvaluationTask], list[EvaluationTask]] = ([], [])
    for task in TEXT_TASKS:
        names = [text._words(label) for label in meta[task]["labels"]]
        head = partial(text.logits, head=text.embed(base, names).clone())
        rows = _rows(data, task, "test")
        order = np.random.default_rng(0).permutation(len(rows))
        stop = TEXT_VALIDATION + TEXT_TEST
        for part, picked in zip(
            parts, (order[:TEXT_VALIDATION], order[TEXT_VALIDATION:stop]), strict=True
        ):
            ids = text.token_ids([rows[i][0] for i in picked])
            by_length = text.by_length(ids)
            batches = [
                text.padded([ids[i] for i in by_length[start : start + text.BATCH]])
                for start in range(0, len(ids), text.BATCH)
            ]
            labels = torch.tensor([rows[picked[i]][1] for i in by_length])
            part.append(EvaluationTask(task, batches, labels, head, task))

    def inputs(seed: int) -> Sequence[Mapping[str, Tensor]]:
        generator = np.random.default_rng(100 + seed)
        texts: list[str] = []
        for task in TEXT_TASKS:
            rows = _rows(data, task, "train")
            texts += [rows[i][0] for i in generator.permutation(len(rows))[:CALIBRATION]]
        ids = sorted(text.token_ids(texts), key=len)
        return [text.padded(ids[i : i + CALIBRATION]) for i in range(0, len(ids), CALIBRATION)]

    keep = {"name": "keep", "model": 0}
    return Benchmark(
        f"MiniLM, {len(TEXT_TASKS)} text tasks", text.base_checkpoint_path(),
        {task: data / "experts_minilm" / f"{task}.delta8.safetensors" for task in TEXT_TASKS},
        text.encoder, *parts, inputs,
        rules=({"match": "embeddings.*", "method": keep}, {"match": "pooler.*", "method": keep}),
    )  # fmt: skip


def _rows(data: Path, task: str, split: str) -> list[tuple[str, int]]:
    with gzip.open(data / "text" / f"{task}.{split}.csv.gz", "rt", encoding="utf-8") as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file)]


class Bench:
    """Merges and judges, and remembers the calibrations."""

    def __init__(self, benchmark: Benchmark, folder: Path) -> None:
        self.of, self._folder = benchmark, folder
        self.module = benchmark.factory()
        self.calibrations = [self._calibration(seed) for seed in SEEDS]

    def recipe(
        self, method: str, *, calibration: int | None = None, seed: int = 0, **p: Any
    ) -> Recipe:
        data: dict[str, Any] = {
            "base": str(self.of.base),
            "experts": [{"path": str(path)} for path in self.of.experts.values()],
            "method": {"name": method, **p}, "rules": list(self.of.rules), "seed": seed,
        }  # fmt: skip
        if calibration is not None:
            data["calibration"] = str(self.calibrations[calibration])
        return make_recipe(data)

    def _calibration(self, seed: int) -> Path:
        path = self._folder / f"{seed}.safetensors"
        batches = self.of.inputs(seed)
        samples = CALIBRATION * len(self.of.experts)
        data = Data(self.of.factory, batches, samples)
        write_calibration(path, calibrate(make_plan(self.recipe("average")), data))
        return path

    def scores(self, recipe: Recipe, tasks: Sequence[EvaluationTask]) -> Scores:
        load_state(self.module, dict(merge_tensors(make_plan(recipe))))
        return self._judged(tasks)

    def _judged(self, tasks: Sequence[EvaluationTask]) -> Scores:
        result: Scores = []
        with torch.inference_mode():
            for task in tasks:
                outputs = [
                    task.head(self.module(b) if isinstance(b, Tensor) else self.module(**b))
                    for b in task.batches
                ]
                result.append((torch.cat(outputs).argmax(1) == task.labels).double().numpy())
        return result

    def tuned(self, method: str, **more: Any) -> dict[tuple[float, float], float]:
        """Return the validation accuracy at each density and scale."""
        found: dict[tuple[float, float], float] = {}
        for density in DENSITIES:
            for scale in SCALES:
                recipe = self.recipe(method, density=density, scale=scale, **more)
                found[density, scale] = mean(self.scores(recipe, self.of.validation))
        return found


def mean(scores: Scores) -> float:
    """Return the accuracy, each task counting the same."""
    return float(np.mean([task.mean() for task in scores]))


def over(several: Sequence[Scores]) -> Scores:
    """Return the mean over seeds, by task and example."""
    return [np.mean(np.stack(parts), axis=0) for parts in zip(*several, strict=True)]


def interval(one: Scores, other: Scores) -> dict[str, float]:
    """Return the accuracy of one merge over another's with a paired bootstrap interval."""
    draws = np.mean(
        [
            np.subtract(*resampled_means(np.stack([a, b]), seed=number).T)
            for number, (a, b) in enumerate(zip(one, other, strict=True))
        ],
        axis=0,
    )
    found = estimate(mean(one) - mean(other), draws)
    return {"value": found.value, "low": found.low, "high": found.high}


def guided_density(plan: Plan) -> float:
    """Return the fraction of entries that the guided tensors keep, as rounded down by row."""
    kept = whole = 0
    for task in plan.tasks.values():
        if not task.calibration or plan.guidance is None:
            continue
        assert isinstance(task.method, GuidedMerge)
        length = row_length(task.spec.shape)
        values = plan.guidance.values(task.name, task.calibration)
        group = _row_group(task.name, task.spec.shape, values, plan.recipe.seed)
        counts = (task.method.row_densities(group) * length + 1e-9).floor()
        kept += int(counts.sum())
        whole += task.spec.numel
    return kept / whole


def row_length(shape: tuple[int, ...]) -> int:
    """Return the entries of a row."""
    return int(np.prod(shape[1:]))


def _row_group(name: str, shape: tuple[int, ...], values: Any, seed: int) -> Any:
    from mergewell.tensor_group import TensorGroup

    zero = torch.zeros(shape)
    return TensorGroup(name, (zero,), torch.ones(1), zero, seed=seed, calibration=values)


def stability(bench: Bench) -> float:
    """Return the mean Spearman correlation of M-Loss ranks between two calibration samples."""
    plans = [make_plan(bench.recipe("m_ties", calibration=seed)) for seed in SEEDS]
    models = (plans[0].reference, *plans[0].experts)
    files = [open_guidance(path, models) for path in bench.calibrations]
    pairs: list[float] = []
    for name in files[0].tensors:
        ranks = [file.values(name, ["m_loss"])["m_loss_rank"].numpy() for file in files]
        pairs += [float(np.corrcoef(ranks[a], ranks[b])[0, 1]) for a, b in ((0, 1), (0, 2), (1, 2))]
    return float(np.mean(pairs))


def compared(bench: Bench, density: float, spread: float, scale: float) -> dict[str, Any]:
    """Return guided M-TIES and its controls at one density, spread and scale, on test examples."""
    setting = {"density": density, "spread": spread, "scale": scale}

    def arm(budget: str, calibration: int, seed: int) -> Recipe:
        return bench.recipe("m_ties", calibration=calibration, seed=seed, budget=budget, **setting)

    arms = {
        "guided": [arm("neutral", seed, 0) for seed in SEEDS],
        "random": [arm("random", 0, seed) for seed in SEEDS],
        "reversed": [arm("reversed", seed, 0) for seed in SEEDS],
        "uniform": [arm("uniform", 0, 0)],
        "ties_same": [bench.recipe("ties", density=density, scale=scale)],
    }
    scores = {name: [bench.scores(r, bench.of.test) for r in rs] for name, rs in arms.items()}
    whole = {name: over(parts) for name, parts in scores.items()}
    against = {n: interval(whole["guided"], s) for n, s in whole.items() if n != "guided"}
    return {
        **setting,
        **{name: mean(part) for name, part in whole.items()},
        "by_seed": {n: [mean(s) for s in parts] for n, parts in scores.items() if len(parts) > 1},
        "kept": {n: guided_density(make_plan(rs[0])) for n, rs in arms.items() if n != "ties_same"},
        "guided_minus": against,
        "low": against["random"]["low"],
        "high": against["random"]["high"],
        "scores": whole["guided"],
    }


def studied(benchmark: Benchmark, folder: Path) -> list[dict[str, Any]]:
    """Return the results of both settings on one benchmark."""
    bench = Bench(benchmark, folder)
    say(f"{benchmark.name}: calibrated")
    ties = bench.tuned("ties")
    guided = bench.tuned("m_ties", calibration=0, spread=SPREAD)
    say(f"ties {ties}\nguided {guided}")
    best_ties, best = max(ties, key=lambda k: ties[k]), max(guided, key=lambda k: guided[k])
    strong = max(SCALES, key=lambda scale: guided[STRONG[0], scale])
    ties_scores = bench.scores(
        bench.recipe("ties", density=best_ties[0], scale=best_ties[1]), benchmark.test
    )
    average = mean(bench.scores(bench.recipe("average"), benchmark.test))
    agreement = stability(bench)
    rows: list[dict[str, Any]] = []
    for name, (density, spread, scale) in {
        benchmark.name: (best[0], SPREAD, best[1]),
        f"{benchmark.name}, strong": (*STRONG, strong),
    }.items():
        row = {"name": name, "seeds": len(SEEDS), **compared(bench, density, spread, scale)}
        row["guided_minus"]["ties_tuned"] = interval(row.pop("scores"), ties_scores)
        row |= {"ties_tuned": mean(ties_scores), "average": average}
        row["ties_setting"] = {"density": best_ties[0], "scale": best_ties[1]}
        row["validation"] = {"ties": ties[best_ties], "guided": guided[best]}
        row["rank_correlation_between_samples"] = agreement
        row["examples"] = sum(len(task.labels) for task in benchmark.test)
        rows.append(row)
        say(json.dumps(row, indent=1))
    return rows


def say(text: str) -> None:
    """Report progress."""
    print(f"[{time.process_time():.0f} CPU s] {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("vision", "text"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for key, make in {"vision": vision_benchmark, "text": text_benchmark}.items():
        if given.only in (None, key):
            with TemporaryDirectory() as folder:
                rows += studied(make(given.data), Path(folder))
    result = {"version": 1, "cpu_seconds": round(time.process_time()), "benchmarks": rounded(rows)}
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """Return data with numbers to five decimals."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
