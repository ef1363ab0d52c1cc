"""Every call that changes the disk fails, or is the last one of the process."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from mergewell.errors import OutputError
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import verify_files

CALLS = ("pwrite", "fsync", "rename", "replace", "posix_fallocate", "ftruncate", "open")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no disk: what fsync does cannot be seen without cutting the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def intercept(
    monkeypatch: pytest.MonkeyPatch, nth: int, act: Callable[[], None]
) -> Callable[[], int]:
    """Do `act` instead of the n-th call that changes the disk; returns how many there were."""
    count = [0]
    for name in CALLS:
        real = getattr(os, name)

        def call(*args: object, real: Callable[..., object] = real, **options: object) -> object:
            count[0] += 1
            if count[0] == nth:
                act()
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)
    return lambda: count[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def check_and_resume(directory: Path, model, expected: dict[str, bytes]) -> bool:
    """Check that the output is absent or complete, then that it can be made complete."""
    present = directory.exists()
    if not present:
        model.write(directory, resume=True)
    assert verify_files(directory) == []
    assert contents(directory) == expected
    return present


def test_a_failure_at_any_call_leaves_all_or_nothing(
    tmp_path: Path, model, expected, monkeypatch: pytest.MonkeyPatch
):
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        count = intercept(patch, 0, fail)
        model.write(tmp_path / "whole")
        calls = count()
    assert calls > 60
    complete, raised = [], []
    for nth in range(1, calls + 1):
        directory = tmp_path / str(nth)
        with monkeypatch.context() as patch:
            intercept(patch, nth, fail)
            try:
                model.write(directory)
            except OutputError:
                raised.append(nth)
        complete.append(check_and_resume(directory, model, expected))
        shutil.rmtree(directory)
    # The rename is the point of no return; after it come the wait for it and the tidying up, whose
    # failure is no failure of the output.
    renamed = complete.index(True)
    assert complete == sorted(complete) and 0 < sum(complete) < 15
    assert raised[:renamed] == list(range(1, renamed + 1)) and len(raised) <= renamed + 2


def test_a_kill_at_any_call_leaves_all_or_nothing(
    tmp_path: Path, model, expected, monkeypatch: pytest.MonkeyPatch
):
    nth, killed = 0, True
    while killed:
        nth += 1
        directory = tmp_path / str(nth)
        child = os.fork()
        if child == 0:
            intercept(monkeypatch, nth, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try:
                model.write(directory)
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        present = check_and_resume(directory, model, expected)
        assert present or killed
        shutil.rmtree(directory)
    assert nth > 60


def test_a_killed_process_is_resumed_by_another(tmp_path: Path, model, expected):
    script = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from conftest import Model
        model = Model()
        writer = model.writer(Path({str(tmp_path / "out")!r}))
        for name in ("a", "b"):
            writer.write(name, 0, model.tensors[name])
        writer.finish(model.layouts[0].file)
        writer.write("e", 0, model.tensors["e"])
        print("half", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        with pytest.raises(OutputError, match="is being written by another process"):
            model.writer(tmp_path / "out", resume=True)
        process.kill()
    assert not (tmp_path / "out").exists()
    pending = model.write(tmp_path / "out", resume=True)
    assert pending == [layout.file for layout in model.layouts[1:]]
    assert contents(tmp_path / "out") == expected
    assert len(open_checkpoint(tmp_path / "out")) == 5
