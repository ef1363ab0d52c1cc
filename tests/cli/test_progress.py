"""Progress off a terminal: plain lines, and fewer of them for commands that are quick."""

from __future__ import annotations

import json

import pytest

from mergewell.cli import progress
from mergewell.cli.main import main


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


def test_events_are_lines_of_json_with_an_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(progress.STYLE, "json")
    told = [json.loads(line) for line in lines(capsys, monkeypatch)]
    steps = [(e["event"], e.get("done"), e.get("total"), e["seconds"]) for e in told]
    assert steps == [
        *(("step", done, 4, 3.0 * done) for done in range(5)), ("end", None, None, 15.0)
    ]  # fmt: skip
    assert told[-1]["ok"] is True

    with pytest.raises(ValueError, match="broken"), progress.steps() as shown:
        for done in range(3):
            shown.update("files", done, 100)  # no half second passes between these
        raise ValueError("broken")
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(e["event"], e.get("done"), e.get("error")) for e in told] == [
        ("step", 0, None), ("end", None, "broken")
    ]  # fmt: skip


def test_the_option_chooses_the_style_for_any_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(progress.STYLE, "auto")
    assert main(["--progress", "none", "methods", "ties"]) == 0
    assert lines(capsys, monkeypatch) == []
    assert main(["--progress", "jsn", "methods"]) == 2
    assert "did you mean 'json'?" in capsys.readouterr().err
