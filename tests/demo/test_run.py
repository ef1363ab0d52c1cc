"""The vision demo from end to end, offline, as `make demo` runs it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from mergewell.demo.run import METHODS, run_demo, summary
from mergewell.demo.vision import TASKS
from mergewell.errors import OutputError
from mergewell.storage.manifest import verify_files


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists already"):
        run_demo(tmp_path, text=False)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_demo_checks_merges_evaluates_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("the demo asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    shown: list[str] = []
    results = run_demo(tmp_path / "demo", text=False, on_step=lambda step, *_: shown.append(step))
    data = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert data["version"] == 1 and data["tasks"] == list(TASKS)
    for kind in ("base", "expert", "ensemble"):
        assert data["accuracy"][kind].keys() == set(TASKS)
    assert data["accuracy"]["merged"].keys() == METHODS.keys()
    for method in METHODS:
        for task in TASKS:
            low, high = data["intervals"]["merged"][method][task]
            assert low <= data["accuracy"]["merged"][method][task] <= high
        assert verify_files(tmp_path / "demo" / "merges" / method) == []
    assert len(data["m_loss"]) == 33 and all(len(m["node"]) == m["nodes"] for m in data["m_loss"])
    assert {"check", "merge", "evaluate"} <= data["seconds"].keys()
    assert data["report"] == "index.html"
    assert (tmp_path / "demo" / "index.html").stat().st_size > 100_000
    assert max(kept["mean"] for kept in data["retention"].values()) >= 0.9
    assert {"weights", "activations", "merges", "evaluation"} <= set(shown)
    assert "own expert" in summary(results)


def test_a_demo_that_is_broken_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergewell.demo.run.check", broken_off)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", text=False)
    assert list(tmp_path.iterdir()) == []
