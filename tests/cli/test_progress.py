"""Progress off a terminal: plain lines, and fewer of them for commands that are quick."""

from __future__ import annotations

import pytest

from mergewell.cli import progress


def lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **how: bool
) -> list[str]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.steps(**how) as shown:
        for done in range(5):
            shown.update("files", done, 4)
            now[0] += 3
    return capsys.readouterr().err.splitlines()


def test_a_step_is_named_and_then_told_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lines(capsys, monkeypatch) == ["files ...", "files 50 %", "files 100 %"]
    assert lines(capsys, monkeypatch, patient=True) == ["files 50 %", "files 100 %"]
