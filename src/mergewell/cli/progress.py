"""Progress: a bar with bytes per second on a terminal, a plain line a step elsewhere, or events.

Events (`--progress json`) are lines of JSON on standard error, for programs:
`{"event": "step", "step": "files", "done": 3, "total": 7, "seconds": 0.4}` when a step begins, at
most twice a second, and when it is done; at last `{"event": "end", "ok": true, "seconds": 1.2}`,
with an `error` where it is not ok. `total` is null where it is not known; further fields and events
may be added. The lines `warning: ...` and the error's own sentence stand among them as they are.
"""

from __future__ import annotations

import json
import os
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

from mergewell.errors import RecipeError, did_you_mean

STYLE = "MERGEWELL_PROGRESS"
"""The environment variable that names the style where no option does."""

STYLES = ("auto", "plain", "json", "none")
"""A bar or lines, as the place takes; lines; events; or nothing."""

_PLAIN_EVERY_S = 5.0
_EVENT_EVERY_S = 0.5


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


class Events(Steps):
    """Tells of named steps by lines of JSON."""

    def __init__(self, console: Console) -> None:
        """Begin to count the seconds."""
        super().__init__(console, None)
        self._began = time.monotonic()

    def update(self, step: str, done: float, total: float) -> None:
        """Tell that `done` of `total` of a step is done, unless that was told just now."""
        now = time.monotonic()
        begins, ends = step not in self._last, bool(total) and done >= total
        if begins or ends or now - self._last[step] >= _EVENT_EVERY_S:
            self._last[step] = now
            self.tell("step", step=step, done=done, total=total or None)

    def tell(self, event: str, **about: object) -> None:
        """Print one event."""
        seconds = round(time.monotonic() - self._began, 3)
        line = json.dumps({"event": event, **about, "seconds": seconds}, ensure_ascii=False)
        print(line, file=sys.stderr, flush=True)


class Silence(Steps):
    """Tells nothing."""

    def update(self, step: str, done: float, total: float) -> None:
        """Do nothing."""


def set_style(style: str) -> None:
    """Choose how progress is shown from now on, here and in what is started from here.

    Raises:
        RecipeError: there is no such style.
    """
    os.environ[STYLE] = _checked(style)


def _checked(style: str) -> str:
    if style not in STYLES:
        raise RecipeError(f"--progress {style}: {did_you_mean(style, STYLES)}")
    return style


@contextmanager
def steps(*, in_bytes: bool = False, patient: bool = False) -> Generator[Steps]:
    """Yield something to report steps to, on standard error.

    If `patient`, a step that is done within seconds is not mentioned outside of a terminal.
    """
    console, wanted = Console(stderr=True), _checked(os.environ.get(STYLE, "auto"))
    if wanted == "json":
        with _told(Events(console)) as events:
            yield events
        return
    if wanted == "none":
        yield Silence(console, None)
        return
    if wanted == "plain" or not console.is_terminal:
        yield Steps(console, None, patient=patient)
        return
    columns: list[ProgressColumn] = [TextColumn("{task.description:<14}"), BarColumn()]
    columns += [DownloadColumn(), TransferSpeedColumn()] if in_bytes else []
    columns += [TimeElapsedColumn()]
    with Progress(*columns, console=console) as progress:
        yield Steps(console, progress)


@contextmanager
def _told(events: Events) -> Generator[Events]:
    """Yield events, and tell how it ended."""
    try:
        yield events
    except BaseException as error:
        events.tell("end", ok=False, error=str(error) or type(error).__name__)
        raise
    events.tell("end", ok=True)
