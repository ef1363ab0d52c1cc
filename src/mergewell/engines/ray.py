"""The Ray engine: shard jobs as Ray tasks, on all machines of a cluster that share a folder.

One task writes one file of the result and is tried again elsewhere when its machine is lost; the
results are done records in the shared folder, so nothing but names goes through Ray. The driver
commits.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergewell.engines.cluster import Cluster, cluster
from mergewell.jobs import run_shard
from mergewell.plan import Plan, make_plan
from mergewell.recipe import make_recipe
from mergewell.run import OnProgress, run
from mergewell.storage.manifest import Algorithm, Manifest
from mergewell.storage.staging import Staging
from mergewell.storage.writer import require_free_name

_PATIENCE_S = 120.0
"""How long a process of a lost machine may hold on to its file."""


def run_on_ray(
    plan: Plan,
    out: str | Path,
    *,
    workers: int | None = None,
    resume: bool = False,
    algorithm: Algorithm = "xxh3-128",
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Carry out a plan on a Ray cluster: that of RAY_ADDRESS, or one begun on this machine.

    Each task has `workers` threads, one if absent. Inputs, recipe paths and `out` must be on a
    file system that all machines see under the same names and whose locks (flock) all respect.

    Raises:
        RecipeError: Ray is not installed.
        OutputError: as `run`, or a file could not be written on any machine.
        CheckpointError, PlanError, MethodError: as `run`.
    """
    directory = Path(out).resolve()
    require_free_name(directory)
    staging = Staging(directory)
    with cluster() as machines:
        lock = staging.lock()
        try:
            if not resume:
                staging.clear()
            staging.join(plan.resume_key())
            fcntl.flock(lock, fcntl.LOCK_SH)  # jobs may come in now, other writers may not
            _run_jobs(machines, plan, directory, workers or 1, algorithm, on_progress)
        finally:
            os.close(lock)
    deadline = time.monotonic() + _PATIENCE_S
    while staging.is_locked() and time.monotonic() < deadline:
        time.sleep(0.2)  # a process of a lost machine ends with it, but not at once
    return run(plan, directory, resume=True, algorithm=algorithm)


def _run_jobs(
    machines: Cluster,
    plan: Plan,
    directory: Path,
    workers: int,
    algorithm: Algorithm,
    on_progress: OnProgress | None,
) -> None:
    task = machines.task(_job, workers=workers)
    arguments = (plan.recipe.as_data(), str(Path.cwd()), str(directory))
    count = len(plan.layouts)
    waiting = {
        task.remote(*arguments, index, count, workers, algorithm): layout
        for index, layout in enumerate(plan.layouts)
    }
    while waiting:
        ready = machines.first(list(waiting))
        layout = waiting.pop(ready)

        def lost(why: str, file: str = layout.file) -> str:
            return (
                f"{directory}: {file} could not be written on the cluster ({why}); see to its "
                "machines and go on with --resume."
            )

        machines.result(ready, lost)
        if on_progress is not None:
            on_progress(sum(spec.nbytes for spec in layout.specs))


def _job(
    recipe: Mapping[str, Any],
    folder: str,
    out: str,
    index: int,
    count: int,
    workers: int,
    algorithm: Algorithm,
) -> None:
    """Write one file; runs on some machine of the cluster."""
    os.chdir(folder)  # relative paths, which the recipe in the files' headers keeps as they are
    plan = make_plan(make_recipe(recipe))
    run_shard(
        plan, out, index, count, commit=False, workers=workers, algorithm=algorithm,
        patience_s=_PATIENCE_S,
    )  # fmt: skip
