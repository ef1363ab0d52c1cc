"""Measures of what is given: data files, functions, names of functions, lm-eval tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mergewell.errors import DataError
from mergewell.evaluation.base import Measure
from mergewell.evaluation.function import function_measure, of_function
from mergewell.evaluation.harness import PREFIX, harness_measure
from mergewell.evaluation.labelled import accuracy_on
from mergewell.evaluation.perplexity import perplexity_on
from mergewell.labelled import load_labelled

Metric = str | Callable[[nn.Module], Any] | Measure
"""`package.module:function`, `lm-eval:TASK[@FOLDER]`, a function of a module, or a measure."""

_BATCH = 32


def given_measures(
    data: Mapping[str, str],
    metrics: Sequence[Metric] = (),
    *,
    experts: int = 0,
    folder: Path | None = None,
    samples: int = 1024,
) -> list[Measure]:
    """Return a measure for each path of data, by the tasks' names, and then for each metric.

    A `.jsonl` of texts is judged by perplexity, all else by accuracy on its `labels`. Of several
    paths each is of the expert of its place. `folder` is a model's, with the tokenizer of texts.

    Raises:
        DataError: nothing is given, data cannot be read, or are neither one path nor one an expert.
        RecipeError: a metric that cannot be found.
    """
    if not data and not metrics:
        raise DataError(
            "Nothing says what to judge by; add --data PATH (with `labels`, or texts) or --metric."
        )
    if len(data) > 1 and experts and len(data) != experts:
        raise DataError(
            f"{len(data)} paths of data are named for {experts} experts; name one, or one for each "
            "expert, in their order."
        )
    found: list[Measure] = []
    for number, (task, path) in enumerate(data.items()):
        read = load_labelled(path, model_folder=folder, limit=samples, batch_size=_BATCH)
        owner = number if len(data) > 1 and experts else None
        if Path(path).suffix == ".jsonl":
            found.append(perplexity_on(task, read.batches, expert=owner))
        else:
            found.append(accuracy_on(task, read, expert=owner))
    return [*found, *(measure_of(metric, folder=folder, samples=samples) for metric in metrics)]


def measure_of(metric: Metric, *, folder: Path | None = None, samples: int = 1024) -> Measure:
    """Return a metric as a measure.

    Raises:
        RecipeError: it cannot be found.
        DataError: an lm-eval task without a model folder, or one that is not there.
    """
    if isinstance(metric, Measure):
        return metric
    if not isinstance(metric, str):
        return of_function(metric, name=str(getattr(metric, "__name__", type(metric).__name__)))
    if not metric.startswith(PREFIX):
        return function_measure(metric)
    if folder is None:
        raise DataError(f"--metric {metric} needs models in folders, with their tokenizer.")
    return harness_measure(metric, model_folder=folder, limit=samples)
