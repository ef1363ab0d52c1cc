"""Which experts are merged, and how: drawn by number, so that any part can be made by anyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from experts import Expert, Experts
from family import Family

from mergewell.methods.base import METHODS
from mergewell.recipe import Recipe, make_recipe

Choices = Mapping[str, Sequence[Any]]

SETTINGS: Mapping[str, Choices] = {
    "average": {},
    "task_arithmetic": {"scale": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)},
    "ties": {"density": (0.05, 0.1, 0.2, 0.4, 0.8), "scale": (0.5, 0.8, 1.0, 1.4, 2.0)},
    "dare": {
        "density": (0.1, 0.3, 0.5, 0.8), "combine": ("sum", "agreeing"),
        "scale": (0.2, 0.3, 0.5, 0.8, 1.0),
    },
    "breadcrumbs": {
        "density": (0.2, 0.5, 0.9), "gamma": (0.005, 0.01, 0.05), "scale": (0.2, 0.4, 0.7, 1.0),
    },
    "della": {"density": (0.2, 0.5, 0.8), "scale": (0.5, 0.8, 1.0, 1.4)},
    "tsv": {"scale": (0.3, 0.5, 0.8, 1.0, 1.3)},
    "iso_c": {"scale": (0.3, 0.5, 0.8, 1.0, 1.3)},
    "iso_cts": {"scale": (0.3, 0.5, 0.8, 1.0, 1.3)},
    "model_stock": {},
    "magmax": {"scale": (0.3, 0.5, 0.8, 1.0)},
    "pcb": {"density": (0.05, 0.1, 0.3), "scale": (0.8, 1.2, 2.0)},
    "sce": {"density": (0.1, 0.3, 1.0), "scale": (0.8, 1.0, 1.5)},
    "regmean": {"alpha": (0.5, 0.9, 1.0)},
    "bmm": {},
    "slerp": {"t": (0.3, 0.5, 0.7)},
}  # fmt: skip
"""Methods and their settings; each merge takes one of each at random."""

ALWAYS = ("average", "task_arithmetic")
"""In every set; of the others some are drawn."""

OTHERS, UNEQUAL = 5, 0.2
"""Methods drawn a set beside them; share of merges whose coefficients differ."""

REASONS = ("other base", "permuted", "flipped", "scaled", "shaken")
"""Why a set is deliberately incompatible."""

COMPATIBLE, SAME_TASK = 0.68, 0.12
"""Shares of sets that are as they come, and of those in which experts may have one task."""


@dataclass(frozen=True)
class ExpertSet:
    """Experts that are merged, in several ways."""

    base: str
    number: int
    experts: tuple[Expert, ...]
    reason: str = ""
    """Why they should not merge; empty where nothing was done to that end."""


@dataclass(frozen=True)
class Merge:
    """One way to merge a set."""

    number: int
    method: str
    parameters: Mapping[str, Any]
    coefficients: tuple[float, ...]
    seed: int


def draw_set(family: Family, experts: Experts, base: str, number: int) -> ExpertSet:
    """Return a set of 2 to 8 experts of a base, by its number.

    Set n draws from the first `first` + n runs, so that merging need not wait for all of them.
    """
    rng = np.random.default_rng([47, family.bases.index(base), number])
    below = family.draws().first + number
    every = [e for e in experts.all.values() if e.run.number < below]
    sound = [e for e in every if e.base == base and e.kind in ("given", "trained")]
    reasons = [r for r in REASONS if r in {e.kind for e in every if e.base == base}]
    reasons += ["other base"] if len(family.bases) > 1 else []
    broken = rng.random() > COMPATIBLE + SAME_TASK and bool(reasons)
    repeats = rng.random() < SAME_TASK / COMPATIBLE
    size = int(rng.choice(family.draws().sizes))
    found: list[Expert] = []
    for place in rng.permutation(len(sound)):
        expert = sound[place]
        if repeats or all(expert.task != other.task for other in found):
            found.append(expert)
        if len(found) == size:
            break
    if not broken:
        return ExpertSet(base, number, tuple(found))
    reason = str(rng.choice(reasons))
    if reason == "other base":
        pool = [e for e in every if e.base != base and e.kind in ("given", "trained")]
    else:
        pool = [e for e in every if e.base == base and e.kind == reason]
    bad = pool[int(rng.integers(len(pool)))]
    kept = [e for e in found if e.task != bad.task][: max(1, size - 1)]
    return ExpertSet(base, number, (*kept, bad), reason)


def draw_merges(of: ExpertSet) -> list[Merge]:
    """Return the ways in which a set is merged."""
    rng = np.random.default_rng([53, *of.base.encode(), of.number])
    others = [n for n in SETTINGS if n not in ALWAYS and (n != "slerp" or len(of.experts) == 2)]
    picked = rng.permutation(others)[:OTHERS]
    found: list[Merge] = []
    for number, method in enumerate((*ALWAYS, *map(str, picked))):
        choices = {key: rng.integers(len(values)) for key, values in SETTINGS[method].items()}
        unequal = number and rng.random() < UNEQUAL and method != "slerp"
        drawn = rng.uniform(0.4, 1.6, len(of.experts)).round(2)
        coefficients = tuple(map(float, drawn)) if unequal else (1.0,) * len(of.experts)
        parameters = {key: SETTINGS[method][key][at] for key, at in choices.items()}
        found.append(Merge(number, method, parameters, coefficients, of.number))
    return found


def needs_inputs(method: str) -> tuple[str, ...]:
    """Return the statistics that a method is made from."""
    return tuple(METHODS.get(method).needs.calibration)


def recipe(
    family: Family, experts: Experts, of: ExpertSet, merge: Merge, calibration: Path | None = None
) -> Recipe:
    """Return the recipe of a merge."""
    data: dict[str, Any] = {
        "base": str(family.base_path(of.base)),
        "experts": [
            {"path": str(experts.path(expert.name)), "coefficient": coefficient}
            for expert, coefficient in zip(of.experts, merge.coefficients, strict=True)
        ],
        "method": {"name": merge.method, **merge.parameters},
        "rules": list(family.rules),
        "seed": merge.seed,
    }
    if calibration is not None:
        data["calibration"] = str(calibration)
    return make_recipe(data)
