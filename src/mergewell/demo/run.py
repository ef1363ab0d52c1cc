"""The demo: check, merge, evaluate and report on real experts, the way a user would."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mergewell.check import Data, build_module, check
from mergewell.demo.suite import Suite
from mergewell.descent.tasks import LearningTask
from mergewell.errors import OutputError
from mergewell.evaluate import Estimate, Evaluation, ModelResult, evaluate
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.report.page import write_page
from mergewell.report.results import MEAN, Check, Results, write_results
from mergewell.run import run
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import versions

OnStep = Callable[[str, float, float], None]

METHODS: Mapping[str, Mapping[str, Any]] = {
    "average": {"name": "average"},
    "task_arithmetic": {"name": "task_arithmetic", "scale": 0.4},
    "ties": {"name": "ties", "density": 0.2},
}
"""The merges that the demo makes; a suite may know better scales."""


def run_demo(folder: Path, *, text: bool, on_step: OnStep | None = None) -> Results:
    """Check, merge, evaluate and write `results.json` and the page into `folder`.

    Raises:
        OutputError: the folder exists and is not empty.
        UserError: packages that the demo needs are missing.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} exists already; remove it, or choose another with --out.")
    hidden = folder.parent / f".{folder.name}.mergewell-demo"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        results = _run(hidden, text=text, step=on_step if on_step is not None else _silent)
        hidden.replace(folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return results


def _run(folder: Path, *, text: bool, step: OnStep) -> Results:
    clock = _Clock()
    with clock.time("experts"):
        suite = _suite(text, step)
    recipes = {
        name: _recipe(suite, {**parameters, **suite.settings.get(name, {})})
        for name, parameters in METHODS.items()
    }
    with clock.time("check"):
        found = check(
            make_plan(_recipe(suite, METHODS["average"])),
            tuple(suite.experts),
            data=Data(
                suite.factory,
                suite.calibration,
                sum(len(_first(batch)) for batch in suite.calibration),
            ),
            tasks=[
                LearningTask(number, own, head=task.head)
                for number, (own, task) in enumerate(zip(suite.own, suite.tasks, strict=False))
            ],
            methods=[recipe.method.model_dump() for recipe in recipes.values()],
            on_step=step,
        )
    with clock.time("merge"):
        for done, (name, recipe) in enumerate(recipes.items()):
            step("merges", done, len(recipes))
            run(make_plan(recipe), folder / "merges" / name)
        step("merges", len(recipes), len(recipes))
    with clock.time("evaluate"):
        evaluation = _evaluate(suite, folder, tuple(recipes), step)
    results = _results(suite, found, evaluation, recipes, folder, clock.seconds)
    write_results(folder, results)
    write_page(folder)
    return results


def _silent(step: str, done: float, total: float) -> None:
    del step, done, total


class _Clock:
    """Seconds a step took, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, step: str) -> Generator[None]:
        began = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - began, 2)


def _suite(text: bool, step: OnStep) -> Suite:
    if text:
        from mergewell.demo import text_experts

        return text_experts.suite(
            on_progress=lambda task, done, total: step(f"training {task}", done, total)
        )
    from mergewell.demo import vision

    return vision.suite()


def _recipe(suite: Suite, method: Mapping[str, Any]) -> Recipe:
    experts = [{"path": str(path)} for path in suite.experts.values()]
    return make_recipe({"base": str(suite.base), "experts": experts, "method": dict(method)})


def _first(batch: object) -> torch.Tensor:
    if isinstance(batch, torch.Tensor):
        return batch
    assert isinstance(batch, Mapping)
    return next(iter(batch.values()))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _evaluate(suite: Suite, folder: Path, merges: tuple[str, ...], step: OnStep) -> Evaluation:
    """Evaluate base, experts and the merges as they stand in their files."""
    with open_checkpoint(suite.base) as base:
        models = {"base": build_module(suite.factory, base)}
        for name, path in suite.experts.items():
            models[name] = build_module(suite.factory, open_checkpoint(path, base=base))
        for name in merges:
            with open_checkpoint(folder / "merges" / name) as merged:
                models[f"merged/{name}"] = build_module(suite.factory, merged)
    return evaluate(
        models,
        suite.tasks,
        ensemble=tuple(suite.experts),
        ensemble_kind="logits",
        on_progress=lambda _, done, total: step("evaluation", done, total),
    )


def _results(
    suite: Suite,
    found: Check,
    evaluation: Evaluation,
    recipes: Mapping[str, Recipe],
    folder: Path,
    seconds: Mapping[str, float],
) -> Results:
    models = evaluation.models
    merged = {name: models[f"merged/{name}"] for name in recipes}
    own = {task.name: models[task.expert].accuracy[task.name] for task in suite.tasks}
    experts_mean = sum(estimate.value for estimate in own.values()) / len(own)
    norms = {name: found.predictors[f"relative_norm:{name}"] for name in suite.experts}
    return Results.model_validate(
        {
            "title": suite.name,
            "tasks": [task.name for task in suite.tasks],
            "models": {"base": _label(suite.base), "experts": list(suite.experts)},
            "accuracy": {
                "base": _values(models["base"].accuracy),
                "expert": _values(own),
                "ensemble": _values(models["ensemble"].accuracy),
                "merged": {name: _values(result.accuracy) for name, result in merged.items()},
            },
            "intervals": {
                "base": _intervals(models["base"]),
                "expert": {task: (e.low, e.high) for task, e in own.items()},
                "ensemble": _intervals(models["ensemble"]),
                "merged": {name: _intervals(result) for name, result in merged.items()},
            },
            "ensemble_kind": evaluation.ensemble_kind,
            "retention": {
                name: {
                    "mean": result.mean_retention.value,
                    "low": result.mean_retention.low,
                    "high": result.mean_retention.high,
                    "worst": {
                        "task": result.worst_task,
                        "value": result.retention[result.worst_task].value,
                    },
                }
                for name, result in merged.items()
            },
            "agreement": {name: _values(result.agreement) for name, result in merged.items()},
            "kl": {name: _values(result.divergence) for name, result in merged.items()},
            "m_loss": found.layers,
            "cosines": found.predictors["cosine"],
            "norms": norms,
            "sign_conflict": found.predictors["sign_conflict"],
            "check": found,
            "merges": [
                {
                    "method": name,
                    "recipe": recipe.to_yaml(),
                    "path": f"merges/{name}",
                    "command": _command(recipe),
                }
                for name, recipe in recipes.items()
            ],
            "seconds": {**seconds, "all": round(sum(seconds.values()), 2)},
            "versions": versions(),
            "experts_mean": experts_mean,
            "examples": dict(evaluation.examples),
        }
    )


def _label(base: Path) -> str:
    """Return a base's file name, or its folders' where the file is called as all are."""
    if base.name != "model.safetensors":
        return base.name
    return f"{base.parent.parent.name}/{base.parent.name}"


def _values(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in estimates.items()}


def _intervals(result: ModelResult) -> dict[str, tuple[float, float]]:
    rows = {name: (e.low, e.high) for name, e in result.accuracy.items()}
    return {**rows, MEAN: (result.mean_accuracy.low, result.mean_accuracy.high)}


def _command(recipe: Recipe) -> str:
    """Return the command that makes a merge again."""
    parts = ["mergewell merge", f"--base {recipe.base}"]
    parts += [f"--expert {os.fspath(expert.path)}" for expert in recipe.experts]
    parts += [f"--method {recipe.method.name}"]
    parts += [f"--set {key}={value}" for key, value in (recipe.method.model_extra or {}).items()]
    return " \\\n  ".join([*parts, "--out DIR"])


def summary(results: Results) -> str:
    """Return what a terminal shows in the end: the verdict and a table of accuracies."""
    accuracy = results.accuracy
    rows = {
        "base": accuracy.base,
        **accuracy.merged,
        f"ensemble ({results.ensemble_kind})": accuracy.ensemble,
        "own expert": accuracy.expert,
    }
    width = max(map(len, rows))
    columns = [max(len(task), 6) for task in results.tasks]
    lines = [results.check.verdict if results.check else "", ""]
    heads = "  ".join(f"{task:>{w}}" for task, w in zip(results.tasks, columns, strict=True))
    lines.append(f"{'accuracy, %':<{width}}  {heads}    mean  retention")
    for name, row in rows.items():
        cells = "  ".join(
            f"{100 * row[task]:{w}.1f}" for task, w in zip(results.tasks, columns, strict=True)
        )
        mean = 100 * sum(row.values()) / len(row)
        kept = results.retention.get(name)
        note = (
            f"  {100 * kept.mean:.1f} [{100 * (kept.low or 0):.1f}, {100 * (kept.high or 0):.1f}]"
            if kept is not None
            else ""
        )
        lines.append(f"{name:<{width}}  {cells}  {mean:6.1f}{note}")
    return "\n".join(lines)
