"""The check's findings in order: what decides, what stands for comparison, and what to do next."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergewell.report.numbers import fine_percent, fixed, number, percent
from mergewell.report.results import Check, Finding, LayerMLoss, Level

STEPS = 4
"""Pieces of advice that are given at most."""

COMPARED = "shown for comparison; weak on its own"
"""What it means that a finding does not decide."""

HOLDS = 0.25
"""How far the ratio of measured to expected gap may be from 1 for the theory to hold."""

_ORDER = {"poor": 0, "fair": 1, "good": 2}


@dataclass(frozen=True, slots=True)
class Places:
    """A finding's value by place, in the order of the network where the names tell it."""

    finding: Finding
    values: Mapping[str, float]
    along: bool
    """True where the places follow one another through the network, false for pairs."""


def deciding(check: Check) -> tuple[Finding, ...]:
    """Return the findings that make the verdict, the one it speaks of first, then by level."""
    return tuple(
        sorted(
            (finding for finding in check.findings if finding.decides),
            key=lambda finding: (not _speaks(finding, check), _ORDER[finding.level]),
        )
    )


def compared(check: Check) -> tuple[Finding, ...]:
    """Return the findings that do not decide, worst level first."""
    others = (finding for finding in check.findings if not finding.decides)
    return tuple(sorted(others, key=lambda finding: _ORDER[finding.level]))


def worst_level(check: Check) -> Level:
    """Return the worst level of the findings that decide, else of the layers."""
    held = [finding.level for finding in check.findings if finding.decides]
    held = held or [check.cutoffs.level(layer.relative) for layer in check.layers]
    order: tuple[Level, ...] = ("poor", "fair")
    found: list[Level] = [level for level in order if level in held]
    return found[0] if found else "good"


def next_steps(check: Check) -> tuple[str, ...]:
    """Return what to do next: the findings' advice, at most `STEPS`, most important first.

    What decides goes before what does not, worse levels before better ones.
    """
    said = [finding.advice for finding in (*deciding(check), *compared(check)) if finding.advice]
    steps = list(dict.fromkeys(said))[:STEPS]
    if not check.samples and len(steps) < STEPS:
        steps.append(
            "Check again with --data and a few unlabelled inputs: weights alone do not show what "
            "the merged model does."
        )
    if not steps:
        steps.append("Merge them, and judge the merge by an evaluation on every task.")
    return tuple(steps)


def measure(finding: Finding) -> tuple[str, str]:
    """Return a finding's number for people and its unit; both empty without a number."""
    if finding.value is None:
        return "", ""
    for word in ("fraction", "relative"):
        if finding.unit.startswith(word):
            return shown(finding.value, finding.unit), finding.unit.removeprefix(word).strip()
    return shown(finding.value, finding.unit), finding.unit


def shown(value: float, unit: str) -> str:
    """Return a value of a finding: a percentage where the unit says so."""
    if unit.startswith(("fraction", "relative")):
        return percent(value) if abs(value) >= 0.01 else fine_percent(value)
    close = 0.9 <= abs(value) < 1  # correlations and cosines: the distance to 1 is what counts
    return fixed(value, 4 if 1 - abs(value) < 0.01 else 3) if close else number(value)


def places(check: Check) -> tuple[Places, ...]:
    """Return the findings that have a value in each of several places."""
    return tuple(
        Places(finding, in_order(finding.by_place), _along(finding.by_place))
        for finding in check.findings
        if len(finding.by_place) > 1
    )


def in_order(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values in the order given, or by number where they were sorted as text.

    A file holds "h.10" before "h.2"; the network does not.
    """
    names = list(values)
    return {
        name: values[name] for name in (sorted(names, key=_natural) if _sorted(names) else names)
    }


def theory_layers(layers: Sequence[LayerMLoss]) -> tuple[LayerMLoss, ...]:
    """Return the layers of which theory says something beside what was measured."""
    return tuple(
        layer
        for layer in layers
        if layer.ratio is not None or layer.expected_gap is not None or layer.bound is not None
    )


def theory_sentence(layers: Sequence[LayerMLoss]) -> str:
    """Return where measurement and theory part; empty where nothing was expected."""
    known = [(layer.ratio, layer.layer) for layer in layers if layer.ratio is not None]
    if not known:
        return ""
    holds = sum(abs(ratio - 1) <= HOLDS for ratio, _ in known)
    far, name = max(known, key=lambda one: abs(math.log(max(one[0], 1e-9))))
    said = (
        f"In {holds} of {len(known)} layers the measured mean gap is within {percent(HOLDS, 0)} "
        "of what Gaussian pre-activations would give"
    )
    if holds == len(known):
        return f"{said}."
    return f"{said}; they part most in {name}, where it is {number(far)} times that."


def _speaks(finding: Finding, check: Check) -> bool:
    return len(finding.verdict) > 1 and check.verdict.endswith(finding.verdict[1:])


def _sorted(names: Sequence[str]) -> bool:
    return list(names) == sorted(names)


def _along(values: Mapping[str, float]) -> bool:
    numbered = sum(any(part.isdigit() for part in name.split(".")) for name in values)
    return numbered >= len(values) / 2


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def left_open(check: Check) -> list[tuple[str, str]]:
    """Return what was not answered, questions of one reason together, and the reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in check.unanswered.items():
        reasons.setdefault(why, []).append(name)
    return [(", ".join(names), why) for why, names in reasons.items()]
