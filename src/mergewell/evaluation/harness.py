"""Tasks of the lm-eval harness as measures; an optional extra, offline with tasks of your own.

A task of your own is a folder of lm-eval YAML files and their data: `dataset_path: json` with
`data_files` reads a local JSONL. Names: `lm-eval:TASK`, or `lm-eval:TASK@FOLDER`.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mergewell.errors import DataError, ModelError, RecipeError
from mergewell.evaluation.base import Measure, Rows

PREFIX = "lm-eval:"
"""How the name of a harness task begins where metrics are named."""

_FIRST = ("acc", "exact_match", "acc_norm", "em", "f1", "mcc", "bleu")
"""Metrics, all better when higher, in the order in which a task's own is looked for."""


def harness_measure(
    name: str, *, model_folder: Path, limit: int | None = None, expert: int | None = None
) -> Measure:
    """Return the measure of an lm-eval task; texts are tokenised as `model_folder` says.

    Each example's own score is taken where the harness keeps one, so that the interval is ours.
    Nothing is downloaded: the harness runs offline.

    Raises:
        RecipeError: the harness is not installed, or the name is none.
        DataError: there is no such task folder, or the task cannot be loaded offline.
    """
    task, at, folder = name.removeprefix(PREFIX).partition("@")
    if not task or (at and not folder):
        raise RecipeError(f"--metric {name}: write {PREFIX}TASK or {PREFIX}TASK@FOLDER.")
    if at and not Path(folder).is_dir():
        raise DataError(f"--metric {name}: {folder} is no folder of lm-eval tasks; check the path.")
    _offline()
    try:
        harness = importlib.import_module("lm_eval")
    except ImportError as error:
        raise RecipeError(
            f"--metric {name} needs the harness: pip install 'mergewell[eval]'."
        ) from error

    def rows(module: nn.Module) -> Rows:
        return _run(harness, module, task, folder or None, model_folder, limit, name)

    return Measure(task, f"lm-eval {task}", rows, expert=expert, needs_folder=True)


def _offline() -> None:
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(variable, "1")


def _run(
    harness: Any,
    module: nn.Module,
    task: str,
    folder: str | None,
    model_folder: Path,
    limit: int | None,
    name: str,
) -> Rows:
    transformers: Any = importlib.import_module("transformers")
    wrapper: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    tasks: Any = importlib.import_module("lm_eval.tasks").TaskManager
    if not isinstance(module, transformers.PreTrainedModel):
        raise ModelError(
            f"--metric {name} runs transformers models, not {type(module).__name__}; name their "
            "folders."
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(model_folder), local_files_only=True, trust_remote_code=False
    )
    try:
        with torch.random.fork_rng(devices=[]):
            found = harness.simple_evaluate(
                model=wrapper(
                    pretrained=module, tokenizer=tokenizer, batch_size=8, device="cpu",
                    max_length=_longest(module),
                ),
                tasks=[task], task_manager=tasks(include_path=folder), limit=limit,
                log_samples=True, bootstrap_iters=0,
            )  # fmt: skip
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        first = str(error).partition("\n")[0]
        raise DataError(
            f"--metric {name}: the harness cannot run it offline ({first}); name a task of your "
            f"own with {PREFIX}TASK@FOLDER."
        ) from error
    return _scores(cast("dict[str, Any]", found), task, name)


def _longest(module: Any) -> int:
    return int(getattr(module.config, "max_position_embeddings", 2048))


def _scores(found: dict[str, Any], task: str, name: str) -> Rows:
    """Return the score of each example, or the task's number where it keeps none."""
    samples: list[dict[str, Any]] = found["samples"].get(task, [])
    for metric in _FIRST:
        scores = [sample[metric] for sample in samples if metric in sample]
        if scores and len(scores) == len(samples) and all(np.isscalar(one) for one in scores):
            return np.asarray(scores, dtype=np.float64)
    results: dict[str, Any] = found["results"].get(task, {})
    for metric in _FIRST:
        value = next((v for key, v in results.items() if key.partition(",")[0] == metric), None)
        if isinstance(value, (int, float)):
            return np.asarray([value], dtype=np.float64)
    raise DataError(f"--metric {name}: the harness gives none of {', '.join(_FIRST)} for it.")
