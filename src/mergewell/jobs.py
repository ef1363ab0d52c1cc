"""Shard jobs: several processes, on one machine or many, write the files of one result.

They share a folder and nothing else: a finished file is a done record in the output's staging
folder. Who finishes last commits. See docs/decisions/0010-shard-jobs.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mergewell.engines.base import make_engine, one_thread_a_worker
from mergewell.errors import OutputError, RecipeError
from mergewell.plan import BLOCK, Plan
from mergewell.repair import mended
from mergewell.run import OnProgress, run, write_files
from mergewell.storage.header import build_header
from mergewell.storage.manifest import MANIFEST, Algorithm, Manifest, read_manifest
from mergewell.storage.passing_hash import PassingHash, hash_while_reading
from mergewell.storage.shard_writer import ShardLayout, ShardWriter
from mergewell.storage.staging import Staging
from mergewell.storage.writer import require_free_name


@dataclass(frozen=True, slots=True)
class JobResult:
    """What became of a shard job."""

    written: tuple[str, ...]
    """Files that this job wrote."""

    missing: tuple[str, ...]
    """Files that no job has finished yet."""

    manifest: Manifest | None
    """That of the result, if this job came last and committed it."""


def parse_shard(text: str) -> tuple[int, int]:
    """Return job i and the number of jobs N from "i/N", i from 0 to N - 1.

    Raises:
        RecipeError: it is not of that form.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found and int(found[1]) < int(found[2]):
        return int(found[1]), int(found[2])
    raise RecipeError(f"--shard {text}: write it as i/N with i from 0 to N - 1, such as 0/4.")


def run_shard(
    plan: Plan,
    out: str | Path,
    index: int,
    count: int,
    *,
    commit: bool = True,
    workers: int | None = None,
    block: int = BLOCK,
    algorithm: Algorithm = "xxh3-128",
    patience_s: float = 0.0,
    on_progress: OnProgress | None = None,
) -> JobResult:
    """Write files `index`, `index + count`, ... of a plan's result; commit if all are there.

    Files that are finished already are kept, so a job may be run again at any time, also after
    the commit. Statistics of the whole model are made by each job for itself; they come out the
    same. A file that another process writes is waited for `patience_s` seconds.

    Raises:
        OutputError: `out` exists, another recipe's run is unfinished there, or a process writes
            it or one of the files.
        CheckpointError, PlanError, MethodError: as `run`.
    """
    directory = Path(out).resolve()
    engine, key = make_engine(workers), plan.resume_key()
    if _is_committed(plan, directory):
        return JobResult((), (), None)
    require_free_name(directory)
    staging = Staging(directory)
    lock = staging.lock(shared=True)
    try:
        staging.join(key)
        missing = _missing(staging, plan, key)
        mine = [layout for layout in plan.layouts[index::count] if layout.file in missing]
        plan = mended(plan) if mine else plan
        with one_thread_a_worker(), _Files(staging, plan, mine, algorithm, patience_s) as files:
            hashes = hash_while_reading(plan.inputs, algorithm, part=index, parts=count)
            write_files(plan, engine, mine, files, block=block, on_progress=on_progress)
        part = f"{index}-of-{count}"
        staging.record_inputs(part, engine.imap(PassingHash.record, hashes), key)
        missing = _missing(staging, plan, key)
    finally:
        os.close(lock)
    # Only now does this job look whether it may commit: had it kept its lock until then, two jobs
    # that finish together would each leave it to the other.
    manifest = None
    if commit and not missing:
        manifest = _commit(plan, directory, workers, algorithm)
    return JobResult(tuple(layout.file for layout in mine), missing, manifest)


def _is_committed(plan: Plan, directory: Path) -> bool:
    """Return whether the output is this plan's, so that a job that comes late has no work."""
    if not (directory / MANIFEST).is_file():
        return False
    manifest = read_manifest(directory)
    files = {str(f): f.stat().st_size for model in plan.inputs for f in model.files}
    files |= {file.path: file.bytes for file in plan.data_records("xxh3-128")}
    merged = {file.path: file.bytes for file in manifest.inputs}
    return manifest.recipe == plan.recipe.as_data() and merged == files


def _commit(
    plan: Plan, directory: Path, workers: int | None, algorithm: Algorithm
) -> Manifest | None:
    """Commit, unless another process is at work or was faster."""
    staging = Staging(directory)
    try:
        return run(plan, directory, workers=workers, resume=True, algorithm=algorithm)
    except OutputError:
        committed = directory.exists() and not staging.has_run()
        if committed or staging.is_locked():
            return None
        raise


def _missing(staging: Staging, plan: Plan, key: str) -> tuple[str, ...]:
    """Return the files of the result that have no done record."""
    metadata = plan.metadata
    sizes = {ly.file: build_header(ly.specs, metadata)[1].size for ly in plan.layouts}
    return tuple(file for file, size in sizes.items() if not staging.recorded(file, key, size))


class _Files:
    """The files of one job, each begun with its first block."""

    def __init__(
        self,
        staging: Staging,
        plan: Plan,
        layouts: list[ShardLayout],
        algorithm: Algorithm,
        patience_s: float,
    ) -> None:
        self._staging, self._plan = staging, plan
        self._algorithm: Algorithm = algorithm
        self._patience_s = patience_s
        self._layouts = {spec.name: layout for layout in layouts for spec in layout.specs}
        self._open: ShardWriter | None = None
        self._file = ""

    def write(self, name: str, start: int, tensor: Tensor) -> None:
        layout = self._layouts[name]
        if self._open is None or layout.file != self._file:
            self._file = layout.file
            self._open = ShardWriter(
                self._staging,
                layout,
                metadata=self._plan.metadata,
                key=self._plan.resume_key(),
                algorithm=self._algorithm,
                patience_s=self._patience_s,
            )
        self._open.write(name, start, tensor)

    def finish(self, file: str, notes: Mapping[str, Any]) -> object:
        if self._open is None or file != self._file:
            raise AssertionError(f"{file} was not begun")
        writer, self._open = self._open, None
        return writer.finish(notes)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open.close()
