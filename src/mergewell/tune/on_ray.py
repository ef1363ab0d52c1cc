"""Candidates judged on a Ray cluster: one task for each merge, with all scales that share it.

What is tried goes through Ray by value, inputs and references too; models are read where the task
runs, from paths that all machines see under the same names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergewell.engines.cluster import cluster
from mergewell.recipe import Recipe, make_recipe
from mergewell.tune.objective import Losses, Objective
from mergewell.tune.space import Candidate
from mergewell.tune.trying import Judge, by_merge, judge_here


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
    with cluster() as machines:
        task = machines.task(_job)
        shared = machines.shared((objective, factory))

        def judge(tried: Sequence[Candidate]) -> Iterator[tuple[Candidate, Losses]]:
            grouped = groupby(by_merge(tried), key=lambda one: one.shared)
            groups = [list(each) for _, each in grouped]
            arguments = (recipe.as_data(), str(Path.cwd()), shared)
            waiting = [task.remote(*arguments, group) for group in groups]
            for group, ready in zip(groups, waiting, strict=True):
                yield from zip(group, machines.result(ready, _lost), strict=True)

        yield judge


def _lost(why: str) -> str:
    return (
        f"Candidates could not be judged on the cluster ({why}); see to its machines and tune "
        "again."
    )


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
