"""Candidates judged on a Ray cluster: one task for each merge, with all scales that share it.

What is tried goes through Ray by value, inputs and references too; models are read where the task
runs, from paths that all machines see under the same names.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergewell.errors import OutputError, RecipeError, UserError
from mergewell.recipe import Recipe, make_recipe
from mergewell.tune.objective import Losses, Objective
from mergewell.tune.space import Candidate
from mergewell.tune.trying import Judge, by_merge, judge_here

_RETRIES = 4
"""Times that the candidates of a lost machine are begun again."""


@contextmanager
def judge_on_ray(
    recipe: Recipe, objective: Objective, factory: Callable[[], nn.Module]
) -> Generator[Judge]:
    """Yield what judges candidates on the cluster of RAY_ADDRESS, or on one begun here.

    The order is that of `trying.by_merge`, the numbers are those of `trying.judge_here`; each task
    has one thread.

    Raises:
        RecipeError: Ray is not installed.
        OutputError: a task was lost on every machine.
        UserError: as `trying.judge_here`.
    """
    ray = _ray()
    began = not ray.is_initialized()
    if began:
        address = os.environ.get("RAY_ADDRESS")
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address is None else None,
        )
    try:
        task = ray.remote(num_cpus=1, max_retries=_RETRIES, scheduling_strategy="SPREAD")(_job)
        shared = ray.put((objective, factory))

        def judge(tried: Sequence[Candidate]) -> Iterator[tuple[Candidate, Losses]]:
            grouped = groupby(by_merge(tried), key=lambda one: one.shared)
            groups = [list(each) for _, each in grouped]
            arguments = (recipe.as_data(), str(Path.cwd()), shared)
            waiting = [task.remote(*arguments, group) for group in groups]
            for group, ready in zip(groups, waiting, strict=True):
                yield from zip(group, _result(ray, ready), strict=True)

        yield judge
    finally:
        if began:
            ray.shutdown()


def _result(ray: Any, ready: Any) -> Sequence[Losses]:
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    except ray.exceptions.RayError as error:
        raise OutputError(
            f"Candidates could not be judged on the cluster ({str(error).splitlines()[0]}); see to "
            "its machines and tune again."
        ) from error


def _job(
    recipe: Mapping[str, Any],
    folder: str,
    shared: tuple[Objective, Callable[[], nn.Module]],
    group: Sequence[Candidate],
) -> list[Losses]:
    """Judge candidates that share a merge; runs on some machine of the cluster."""
    os.chdir(folder)
    torch.set_num_threads(1)
    objective, factory = shared
    with judge_here(make_recipe(recipe), objective, factory) as judge:
        return [losses for _, losses in judge(group)]


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise RecipeError(
            "--engine ray needs Ray, which is not installed: pip install 'mergewell[ray]'."
        ) from error
