"""Whole merges that are broken off: the output's name holds nothing or the complete result.

Failures at single calls of the storage layer are tested in storage/test_crash.py; here the whole
command line runs. The campaign of 500 kills is benchmarks/crash/kills.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from test_jobs import contents, recipe_for
from toys import save, tensors

from mergewell.cli.main import main
from mergewell.errors import OutputError
from mergewell.plan import make_plan
from mergewell.run import run
from mergewell.storage.manifest import verify_files

CALLS = ("pwrite", "fsync", "rename", "replace", "posix_fallocate", "ftruncate", "open")
SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "crash"


def fail_at(patch: pytest.MonkeyPatch, nth: int, number: int) -> Callable[[], int]:
    """Let the n-th call that changes the disk fail; returns how many there were."""
    count = [0]
    for name in CALLS:
        real = getattr(os, name)

        def call(*args: object, real: Callable[..., object] = real, **options: object) -> object:
            count[0] += 1
            if count[0] == nth:
                raise OSError(number, os.strerror(number))
            return real(*args, **options)

        patch.setattr(os, name, call)
    return lambda: count[0]


@pytest.mark.parametrize(
    ("arguments", "number"),
    [(["--resume"], errno.EIO), (["--shard", "0/1"], errno.ENOSPC)],
    ids=["merge", "shard"],
)
def test_a_failure_at_any_call_of_a_merge_leaves_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: list[str], number: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    base = save(tmp_path / "base", tensors(0), shards=2)
    expert = save(tmp_path / "expert", tensors(1) | {"steps": tensors(0)["steps"]}, shards=2)
    flags = ["merge", "--base", str(base), "--expert", str(expert), "--workers", "1", *arguments]
    flags += ["--method", "task_arithmetic", "--out"]
    with monkeypatch.context() as patch:
        count = fail_at(patch, 0, number)
        assert main([*flags, str(tmp_path / "whole")]) == 0
        calls = count()
    assert calls > 35
    expected = contents(tmp_path / "whole")
    complete: list[bool] = []
    for nth in range(1, calls + 1):
        out = tmp_path / "out"
        capsys.readouterr()
        with monkeypatch.context() as patch:
            fail_at(patch, nth, number)
            code = main([*flags, str(out)])
        message = capsys.readouterr().err.removeprefix("merge ...\n")
        complete.append(out.exists())
        if not complete[-1]:
            assert code == 2 and message.startswith("mergewell: "), (nth, code, message)
            assert message.count("\n") == 1 and os.strerror(number) in message
            assert main([*flags, str(out)]) == 0, capsys.readouterr().err
        assert contents(out) == expected and verify_files(out) == []
        shutil.rmtree(out)
        remains = list(tmp_path.glob(".*"))
        if complete[-1]:  # the failure was one of tidying up
            shutil.rmtree(remains[0], ignore_errors=True) if remains else None
        else:
            assert not remains, "a resumed run leaves nothing behind"
    assert complete == sorted(complete) and 0 < sum(complete) < calls / 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """Mount a real file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    mounted = subprocess.run(["mount", *options], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a tmpfs can be mounted by root only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take all the space that a disk has left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return filler


@pytest.mark.parametrize("files", [0, 1, 3])
def test_a_disk_that_fills_up_during_a_merge(tmp_path: Path, small_disk: Path, files: int) -> None:
    """Others write to the disk after so many files; when space is there again, it goes on."""
    plan = make_plan(recipe_for(tmp_path, shards=3))
    run(plan, tmp_path / "whole")
    out = small_disk / "out"
    sizes = [sum(spec.nbytes for spec in layout.specs) for layout in plan.layouts]
    written = 0

    def progress(count: int) -> None:
        nonlocal written
        written += count
        if not (small_disk / "filler").exists() and written >= sum(sizes[:files]):
            fill(small_disk)

    with pytest.raises(OutputError, match=r"No space left on device.*free space"):
        run(plan, out, workers=1, on_progress=progress)
    assert not out.exists()
    with pytest.raises(OutputError, match=r"(needs .* bytes|No space left)"):
        run(plan, out, workers=1, resume=True)
    assert not out.exists()
    (small_disk / "filler").unlink()
    run(plan, out, workers=1, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_second_writer_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    plan = make_plan(recipe_for(tmp_path))
    run(plan, tmp_path / "whole")
    out = tmp_path / "out"
    tried = []

    def intrude(_: int) -> None:
        for resume in (False, True):
            with pytest.raises(OutputError, match="being written by another process"):
                run(plan, out, resume=resume)
            tried.append(resume)

    run(plan, out, workers=1, on_progress=intrude)
    assert tried and contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_forty_kills_at_random_moments(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, SCRIPTS / "kills.py", "--count", "40", "--seed", "1", "--work", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["resumed"], found["damaged"], found["not_resumed"]) == (40, 0, 0)


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_headers_and_recipes_are_read_or_named(count: int) -> None:
    ran = subprocess.run(
        [sys.executable, SCRIPTS / "fuzz.py", "--count", str(count), "--seed", str(count)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["failures"] == 0 and found["cases"] == count
    for outcomes in found["outcomes"].values():
        assert outcomes["read"] > count / 100, "hardly a case is read, so this shows little"
