"""The figures that stand beside pages: JSON by the page's command, the numbers of the page."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def script(path: str) -> Any:
    """A script of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "benchmarks" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_alignment_figures_are_means_over_pairs_and_leave_out_what_was_not_measured() -> None:
    known = dict.fromkeys(script("alignment/study.py").FIGURES, 1.0)
    same = {"task": "mnist", "net": "MLP", "alignment": "zipit", "repair": "raw"}
    rows = [{**same, **known, "accuracy": a, "distance": ""} for a in (0.25, 0.5, 0.375)]
    (found,) = script("alignment/study.py").as_data(rows)["rows"]
    assert found["accuracy"] == {"mean": 0.375, "low": 0.25, "high": 0.5}
    assert "distance" not in found
    assert found["pairs"] == 3


def test_a_spectral_row_takes_the_place_of_the_one_of_its_setting(tmp_path: Path) -> None:
    keep, out = script("spectral/cost.py").keep, tmp_path / "spectral.json"
    for side, ratio in ((64, 1.5), (128, 1.2), (64, 1.1)):
        keep(out, "time", {"method": "tsv", "side": side, "experts": 4, "ratio": ratio})
    rows = json.loads(out.read_text())["time"]
    assert [(row["side"], row["ratio"]) for row in rows] == [(128, 1.2), (64, 1.1)]


def test_routing_figures_are_those_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ROOT / "benchmarks" / "routing" / "vision.csv"
    monkeypatch.setattr(sys, "argv", ["page.py", str(rows), str(tmp_path / "routing.json")])
    script("routing/page.py").main()
    made = (tmp_path / "routing.json").read_text()
    assert made == (ROOT / "docs" / "benchmarks" / "routing.json").read_text()
    page = (ROOT / "docs" / "benchmarks" / "routing.md").read_text().splitlines()
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [
        line for line in page if line.startswith("|")
    ]


def test_demo_experts_figures_are_those_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["figures.py", "--out", str(tmp_path / "found.json")])
    script("experts/figures.py").main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == json.loads((ROOT / "docs" / "studies" / "demo_experts.json").read_text())
    page = (ROOT / "docs" / "studies" / "demo_experts.md").read_text()
    assert f"**{found['test']['accuracy']['ties 1.25']['retention']:.1f}**" in page
    with (ROOT / "benchmarks" / "experts" / "tried.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert f"| {row['task_arithmetic']} ({row['task_arithmetic_scale']}) | " in page
