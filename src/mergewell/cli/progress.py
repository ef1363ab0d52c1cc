"""Progress: a bar with bytes per second on a terminal, a plain line a step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

_PLAIN_EVERY_S = 5.0


class Steps:
    """Shows named steps; `update` may be called as often as one likes."""

    def __init__(
        self, console: Console, progress: Progress | None, *, patient: bool = False
    ) -> None:
        """Draw on `progress`, or print plain lines where it is None; see `steps`."""
        self._console = console
        self._patient = patient
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}

    def update(self, step: str, done: float, total: float) -> None:
        """Show that `done` of `total` of a step is done."""
        if self._progress is not None:
            if step not in self._tasks:
                self._tasks[step] = self._progress.add_task(step, total=total)
            self._progress.update(self._tasks[step], completed=done, total=total)
            return
        now = time.monotonic()
        if step not in self._last:
            self._last[step] = now
            if not self._patient:
                print(f"{step} ...", file=sys.stderr, flush=True)
        elif now - self._last[step] > _PLAIN_EVERY_S and total:
            self._last[step] = now
            print(f"{step} {100 * done / total:.0f} %", file=sys.stderr, flush=True)


@contextmanager
def steps(*, in_bytes: bool = False, patient: bool = False) -> Generator[Steps]:
    """Yield something to report steps to, on standard error.

    If `patient`, a step that is done within seconds is not mentioned outside of a terminal.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Steps(console, None, patient=patient)
        return
    columns: list[ProgressColumn] = [TextColumn("{task.description:<14}"), BarColumn()]
    columns += [DownloadColumn(), TransferSpeedColumn()] if in_bytes else []
    columns += [TimeElapsedColumn()]
    with Progress(*columns, console=console) as progress:
        yield Steps(console, progress)
