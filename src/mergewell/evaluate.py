"""Evaluation: every model on the same batches, with intervals, retention and the ensemble.

Each model is run exactly once over each task; the ensemble is made from the experts' stored
outputs. Everything measured is the mean over examples of a score of one example, so one paired
bootstrap (the same resamples for all models and scores) gives every interval; a later metric is
one more row of scores.

Shapes: N examples, D features, C classes, M models, S scores, R resamples.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mergewell.engines.base import Engine, make_engine, one_thread_a_worker
from mergewell.errors import DataError, ModelError, did_you_mean
from mergewell.models.dataflow import Batch
from mergewell.models.ensemble import (
    EnsembleKind,
    checked_kind,
    ensemble_outputs,
    run_batch,
    simplex,
)

ENSEMBLE = "ensemble"
"""The name under which the ensemble stands among the models."""

RESAMPLES = 2000
"""Resamples of the bootstrap."""

LEVEL = 0.95
"""Level of every interval."""

Progress = Callable[[str, int, int], None]
"""Called as (model, batches done, batches in all)."""

_CHUNK = 100  # resamples made at once; bounds the memory to 100 times the examples

Rows = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """A task: batches of inputs, their labels, the frozen head, and the expert of the task."""

    name: str
    batches: Sequence[Batch]
    """Batches of inputs, in the order of the labels; each is given to every model as it is."""

    labels: Tensor
    """Labels of all examples, [N], whole numbers from 0."""

    head: Callable[[Tensor], Tensor]
    """Features [n, D] to logits [n, C]; the same for every model."""

    expert: str
    """Name of the model that was fine-tuned for this task."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % bootstrap interval over the examples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ModelResult:
    """What one model gave, by task and over the tasks."""

    accuracy: Mapping[str, Estimate]
    """Fraction of right answers."""

    retention: Mapping[str, Estimate]
    """Accuracy over that of the task's own expert; nan where that expert is never right."""

    agreement: Mapping[str, Estimate]
    """Fraction of the examples on which the answer is the ensemble's."""

    divergence: Mapping[str, Estimate]
    """Mean KL(ensemble || model) in nats."""

    mean_accuracy: Estimate
    """Mean over the tasks, each task counting the same."""

    mean_retention: Estimate
    """Mean over the tasks, each task counting the same."""

    worst_task: str
    """The task of the lowest retention."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of `evaluate`; the ensemble is among the models under the name "ensemble"."""

    models: Mapping[str, ModelResult]
    experts: Mapping[str, str]
    """The expert of each task, by the task's name."""

    ensemble: tuple[str, ...]
    """Names of the ensemble's experts."""

    ensemble_kind: EnsembleKind
    examples: Mapping[str, int]
    """N of each task."""

    seed: int
    resamples: int = RESAMPLES
    level: float = field(default=LEVEL)


def evaluate(
    models: Mapping[str, nn.Module],
    tasks: Sequence[EvaluationTask],
    *,
    ensemble: tuple[str, ...],
    ensemble_kind: EnsembleKind,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Return accuracy, retention and closeness to the ensemble for every model and task.

    Models are looked up one after the other and once, so a mapping that loads them when asked
    keeps one in memory. Their train or eval mode is left as it was found.

    Raises:
        RecipeError: an ensemble of no experts or of an unknown kind.
        DataError: tasks that cannot be used: none, empty, of unknown experts, labels that do not
            fit the batches or the head, a head that does not fit the features.
        ModelError: a model gives no tensor, or numbers that are not finite.
    """
    checked_kind(ensemble_kind)
    simplex(None, len(ensemble))
    _check(models, tasks, ensemble)
    engine = make_engine()
    total = len(models) * sum(len(task.batches) for task in tasks)
    done = 0
    logits: dict[str, dict[str, Tensor]] = {task.name: {} for task in tasks}
    features: dict[str, dict[str, Tensor]] = {task.name: {} for task in tasks}
    for name in models:
        module = models[name]
        for task in tasks:
            outputs: list[Tensor] = []
            for output in _outputs(module, task.batches, engine):
                outputs.append(output)
                done += 1
                if on_progress is not None:
                    on_progress(name, done, total)
            feature = _joined(outputs, task, name)
            logits[task.name][name] = _logits(feature, task, name)
            if ensemble_kind == "features" and name in ensemble:
                features[task.name][name] = feature
    names = [*models, ENSEMBLE]
    measured: list[_Measured] = []
    for task in tasks:
        held = logits[task.name]
        if ensemble_kind == "features":
            mean = ensemble_outputs([features[task.name][name] for name in ensemble], "features")
            held[ENSEMBLE] = _logits(mean, task, ENSEMBLE)
        else:
            held[ENSEMBLE] = ensemble_outputs([held[name] for name in ensemble], ensemble_kind)
        scores = _scores([held[name] for name in names], task.labels)
        draws = resampled_means(scores, seed=seed + zlib.crc32(task.name.encode()))
        measured.append(_Measured(task.name, names.index(task.expert), scores.mean(-1), draws))
    return Evaluation(
        models={name: _result(row, measured) for row, name in enumerate(names)},
        experts={task.name: task.expert for task in tasks},
        ensemble=ensemble,
        ensemble_kind=ensemble_kind,
        examples={task.name: task.labels.numel() for task in tasks},
        seed=seed,
    )


def resampled_means(scores: Rows, *, seed: int, resamples: int = RESAMPLES) -> Rows:
    """Return the means [R, ...] of R bootstrap resamples of the examples of scores [..., N].

    All rows share their resamples, so that differences and ratios of rows are paired. Source:
    Efron & Tibshirani 1993, chapter 6 (the percentile bootstrap).
    """
    flat = scores.reshape(-1, scores.shape[-1])
    count = flat.shape[1]
    generator = np.random.default_rng(seed)
    parts: list[Rows] = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        picked = generator.integers(count, size=(size, count))
        picked += np.arange(size)[:, None] * count
        times = np.bincount(picked.reshape(-1), minlength=size * count).reshape(size, count)
        parts.append(times.astype(np.float64) @ flat.T / count)
    return np.concatenate(parts).reshape(resamples, *scores.shape[:-1])


def estimate(value: float, draws: Rows) -> Estimate:
    """Return a value with the percentile interval of those draws [R] that are defined."""
    defined = draws[np.isfinite(draws)]
    if defined.size == 0:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


@dataclass(frozen=True, slots=True)
class _Measured:
    """Scores of one task: accuracy, agreement and divergence of each model."""

    task: str
    own: int  # the row of the task's expert
    means: Rows  # [S, M]
    draws: Rows  # [R, S, M]


def _result(row: int, measured: Sequence[_Measured]) -> ModelResult:
    values = [
        [*m.means[:, row], float(_ratio(m.means[0, row], m.means[0, m.own]))] for m in measured
    ]
    draws = [
        [*m.draws[:, :, row].T, _ratio(m.draws[:, 0, row], m.draws[:, 0, m.own])] for m in measured
    ]
    accuracy, agreement, divergence, retention = (
        {
            m.task: estimate(value[score], draw[score])
            for m, value, draw in zip(measured, values, draws, strict=True)
        }
        for score in range(4)
    )
    mean_accuracy, mean_retention = (
        estimate(
            float(np.mean([value[score] for value in values])),
            np.mean([draw[score] for draw in draws], axis=0),
        )
        for score in (0, 3)
    )
    return ModelResult(
        accuracy=accuracy,
        retention=retention,
        agreement=agreement,
        divergence=divergence,
        mean_accuracy=mean_accuracy,
        mean_retention=mean_retention,
        worst_task=min(
            retention, key=lambda task: (np.isnan(retention[task].value), retention[task].value)
        ),
    )


def _ratio(part: Rows | np.float64, whole: Rows | np.float64) -> Rows:
    """Return part / whole, nan where whole is 0."""
    whole = np.asarray(whole)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _scores(logits: Sequence[Tensor], labels: Tensor) -> Rows:
    """Return the scores [S, M, N] of M models; the ensemble is the last of the logits."""
    logs = [logit.double().log_softmax(-1) for logit in logits]
    answers = [log.argmax(-1) for log in logs]
    return np.stack(
        [
            torch.stack([(answer == labels).double() for answer in answers]).numpy(),
            torch.stack([(answer == answers[-1]).double() for answer in answers]).numpy(),
            torch.stack([kl_divergence(logs[-1], log) for log in logs]).numpy(),
        ]
    )


def kl_divergence(logs: Tensor, other: Tensor) -> Tensor:
    """Return KL(p || q) of each example in nats, [N], from log-probabilities [N, C] of both."""
    return (logs.exp() * (logs - other)).sum(-1)


def _outputs(module: nn.Module, batches: Sequence[Batch], engine: Engine) -> Iterator[Tensor]:
    """Yield the outputs of a module in eval mode; the mode of each of its parts is restored."""

    def run(batch: Batch) -> Tensor:
        with torch.inference_mode():
            return run_batch(module, batch).cpu()

    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with one_thread_a_worker():
            yield from engine.imap(run, batches)
    finally:
        for part in training:
            part.training = True


def _joined(outputs: Sequence[Tensor], task: EvaluationTask, model: str) -> Tensor:
    """Return all outputs of a task, [N, D], as many as labels and finite."""
    features = torch.cat(list(outputs))
    if len(features) != len(task.labels):
        raise DataError(
            f"Task {task.name!r} has {len(task.labels)} labels but its batches give "
            f"{len(features)} outputs; give one label an example, in the batches' order."
        )
    if not features.isfinite().all():
        raise ModelError(
            f"Model {model!r} gives outputs that are not finite on task {task.name!r}; "
            "its weights are damaged or its coefficients too large."
        )
    return features


def _logits(features: Tensor, task: EvaluationTask, model: str) -> Tensor:
    """Return the logits [N, C] that the task's head makes of a model's features [N, D]."""
    try:
        with torch.inference_mode():
            logits = task.head(features)
    except RuntimeError as error:
        raise DataError(
            f"The head of task {task.name!r} does not take the features of model {model!r}, shape "
            f"{tuple(features.shape)} ({str(error).splitlines()[0]}); use the head of this base."
        ) from error
    if logits.dim() != 2 or len(logits) != len(features):
        raise DataError(
            f"The head of task {task.name!r} makes {tuple(logits.shape)} of "
            f"{tuple(features.shape)}; it must give one row of logits an example."
        )
    if int(task.labels.max()) >= logits.shape[1]:
        raise DataError(
            f"Task {task.name!r} has the label {int(task.labels.max())} but its head knows "
            f"{logits.shape[1]} classes, from 0; use labels and a head that belong together."
        )
    return logits


def _check(
    models: Mapping[str, nn.Module], tasks: Sequence[EvaluationTask], ensemble: tuple[str, ...]
) -> None:
    """Refuse, before anything is run, what cannot be evaluated."""
    if not tasks:
        raise DataError("There is no task to evaluate on; give at least one.")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise DataError(f"Two tasks have one name ({', '.join(names)}); give each its own.")
    if ENSEMBLE in models:
        raise DataError(f"A model is called {ENSEMBLE!r}, the name of the result's own ensemble.")
    for name in ensemble:
        if name not in models:
            raise DataError(
                f"The ensemble names the unknown model {name!r}: {did_you_mean(name, models)}"
            )
    for task in tasks:
        if not task.batches or task.labels.numel() == 0:
            raise DataError(f"Task {task.name!r} has no examples; give it some or leave it out.")
        if task.labels.dim() != 1 or task.labels.is_floating_point() or int(task.labels.min()) < 0:
            raise DataError(
                f"The labels of task {task.name!r} must be one row of whole numbers from 0."
            )
        if task.expert not in models:
            raise DataError(
                f"Task {task.name!r} names the unknown expert {task.expert!r}: "
                f"{did_you_mean(task.expert, models)}"
            )
