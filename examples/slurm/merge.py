"""A merge as a Slurm array, by submitit: python merge.py RECIPE OUT JOBS (pip install submitit)."""

from __future__ import annotations

import sys
from pathlib import Path

import submitit  # pyright: ignore[reportMissingImports]

from mergewell.jobs import JobResult, run_shard
from mergewell.plan import make_plan
from mergewell.recipe import read_recipe


def job(recipe: str, out: str, index: int, count: int) -> JobResult:
    """Write one job's files; the last job commits."""
    return run_shard(make_plan(read_recipe(recipe)), out, index, count, workers=4)


def main() -> None:
    """Submit the jobs and wait for them."""
    recipe, out = (str(Path(argument).resolve()) for argument in sys.argv[1:3])
    count = int(sys.argv[3])
    executor = submitit.AutoExecutor(folder=Path(out).with_suffix(".submitit"))
    executor.update_parameters(cpus_per_task=4, mem_gb=4, timeout_min=120)
    jobs = executor.map_array(
        job, *zip(*((recipe, out, i, count) for i in range(count)), strict=True)
    )
    for submitted in jobs:
        submitted.result()


if __name__ == "__main__":
    main()
