"""The advice study on made-up rows whose effects are known, and its page and picture."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "atlas"
NAMES = ("book", "table", "advice", "advice_page")


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    """The study's module; its folder is put on the path, as Python does for scripts."""
    outside = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    importlib.import_module("advice_page")
    yield importlib.import_module("advice")
    sys.path.remove(str(FOLDER))
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(outside)


def made(study: ModuleType) -> Any:
    """Return rows in which a doubled rate costs 3 points, 1 of them by the others' rate."""
    rng = np.random.default_rng(0)
    experts: dict[str, dict[str, Any]] = {}
    for number in range(40):
        run = {
            "rate": float(2.0 ** rng.integers(-8, -2)), "batch": int(rng.choice([8, 16, 32])),
            "samples": int(rng.choice([100, 400])), "decay": 0.0, "noise": 0.0, "number": number,
            "optimiser": str(rng.choice(["adamw", "sgd"])), "steps": 40, "base": "b",
            "task": f"t{number % 4}", "kind": "trained",
        }  # fmt: skip
        for step in (10, 40):
            name = f"{number}.{step}"
            norm = 1e-3 * run["rate"] * step * rng.lognormal(0, 0.1)
            experts[name] = run | {"expert": name, "step": step, "relative_norm": norm}
    rows: list[dict[str, Any]] = []
    found = study.Rows("toy", rows, experts)
    for number in range(150):
        names = [str(n) for n in rng.choice(list(experts), rng.integers(2, 5), replace=False)]
        rates = [found.settings[name]["learning_rate"] for name in names]
        for method in ("average", "ties"):
            for place, name in enumerate(names):
                others = np.mean([r for p, r in enumerate(rates) if p != place])
                kept = 0.9 - 0.02 * rates[place] - 0.01 * others + rng.normal(0, 0.01)
                rows.append(
                    {
                        "base": "b", "set": number, "merge": method, "place": place,
                        "expert": name, "task": experts[name]["task"], "experts": names,
                        "method": method, "way": f"{method} 1", "own": 0.5, "merged": 0.5 * kept,
                    }
                )  # fmt: skip
    return found


def test_known_effects_are_found_within_their_intervals(study: ModuleType) -> None:
    effects = study.settings_fit(made(study), draws=40)
    rate = effects["learning_rate"]
    assert rate["effect"] == pytest.approx(-3, abs=0.2)
    assert rate["own"]["effect"] == pytest.approx(-2, abs=0.2)
    assert rate["others"]["effect"] == pytest.approx(-1, abs=0.2)
    assert rate["low"] < -3 < rate["high"] < 0
    assert rate["merged_accuracy"]["effect"] == pytest.approx(-1.5, abs=0.1)
    assert abs(effects["batch_size"]["effect"]) < 0.5
    assert "weight_decay" not in effects  # none differed


def test_powers_of_the_norm_and_verdicts(study: ModuleType) -> None:
    powers = study.norms(made(study), draws=20)
    assert powers["sgd"]["learning_rate"]["effect"] == pytest.approx(1, abs=0.1)
    assert study.verdict(-1, {"effect": -2, "low": -3, "high": -1}) == "agrees"
    assert study.verdict(1, {"effect": -2, "low": -3, "high": -1}) == "disagrees"
    assert study.verdict(1, {"effect": -2, "low": -3, "high": 1}) == "open"
    assert study.overall(["open", "agrees"]) == "agrees"
    assert study.overall(["disagrees", "agrees"]) == "mixed"


def test_a_family_becomes_a_page_and_a_picture(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = made(study)
    monkeypatch.setattr(study.Rows, "of", lambda family: rows)
    family = study.study("small_cnn", 10)
    verdicts = {knob: one["verdict"] for knob, one in family["effects"].items()}
    assert verdicts["learning_rate"] == "agrees" and "late" in verdicts
    told = {"version": 1, "merges": 1, "runs": 40, "draws": 10, "verdicts": verdicts,
            "families": {"small_cnn": family}}  # fmt: skip
    page = importlib.import_module("advice_page")
    text = page.page(told, None)
    assert "| learning rate | doubled | − | small CNN | −3.0 [" in text
    assert page.picture(told).startswith("<svg")
    quoted = study.shipped(told)["effects"]["learning_rate"]["small_cnn"]
    assert set(quoted) == {"retention", "merged_accuracy"}
