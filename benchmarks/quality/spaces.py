"""What is searched for each method: the same number of candidates for all of them.

A candidate is a choice of the method's parameters and a *scale*, a factor on the merged task
vector: result = base + scale * (merged - base). Where a method has such a factor itself it is held
at 1 (`fixed`), so that one merge serves many scales. Candidates are a Latin hypercube: each of the
`BUDGET` scales is taken once, each value of a parameter as often as any other, in a random order
that depends on the method's name alone. A method that is not in the table, for instance because it
was written after it, gets its default parameters and `BROAD` scales.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BUDGET = 10
"""Candidates of every method."""

SUM = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
"""For a sum of task vectors."""

MEAN = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.4)
"""For a mean of task vectors, of which 8 nearly orthogonal ones leave little."""

BROAD = (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6)
"""For what sets its size itself: spectral and Gram merges."""

LEARNED = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.7)
"""For learned coefficients, which should need none."""

AS_IS = (1.0,)
"""Nothing is searched."""


@dataclass(frozen=True)
class Space:
    """The search space of one method."""

    scales: tuple[float, ...] = BROAD
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """One setting of one method."""

    parameters: Mapping[str, Any]
    scale: float


DENSITY = (0.05, 0.1, 0.2, 0.4, 0.8)

SPACES: Mapping[str, Space] = {
    # plain
    "average": Space(AS_IS),
    "task_arithmetic": Space(SUM, fixed={"scale": 1.0}),
    "ties": Space(MEAN, {"density": DENSITY}),
    "dare": Space(MEAN, {"density": (0.2, 0.5, 0.8), "combine": ("sum", "agreeing")}),
    "della": Space(MEAN, {"density": (0.2, 0.5, 0.8), "epsilon": (0.05, 0.15)}),
    "breadcrumbs": Space(SUM, {"density": (0.2, 0.5, 0.9), "gamma": (0.005, 0.01, 0.05)}),
    "sce": Space(MEAN, {"density": (0.1, 0.3, 0.6, 1.0)}),
    "cabs": Space(SUM, {"n": (32, 64, 128)}),
    "consensus": Space(SUM, {"threshold": (0.2, 0.4, 0.6), "minimum": (1, 2, 3)}, {"scale": 1.0}),
    "emr": Space(BROAD),
    "karcher": Space(MEAN),
    "lines": Space(BROAD, {"beta": (0.0, 0.25, 0.5, 0.75, 1.0)}),
    "localize_and_stitch": Space(BROAD, {"density": (0.01, 0.05, 0.1, 0.2, 0.5)}),
    "m_dare": Space(MEAN, {"density": (0.2, 0.5, 0.8), "spread": (0.1, 0.2)}),
    "m_ties": Space(MEAN, {"density": (0.2, 0.4, 0.8), "spread": (0.1, 0.2)}),
    "magmax": Space(BROAD, fixed={"scale": 1.0}),
    "metagpt": Space(BROAD),
    "model_stock": Space((0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 11.0, 15.0, 20.0)),
    "multislerp": Space(MEAN),
    "pcb": Space(BROAD, {"density": (0.05, 0.1, 0.2, 0.4)}, {"scale": 1.0}),
    "ram": Space(BROAD, {"plus": (False, True)}),
    "wise_ft": Space(MEAN, fixed={"t": 1.0}),
    # spectral
    "tsv": Space(BROAD),
    "iso_c": Space(BROAD),
    "iso_cts": Space(BROAD, {"common": (0.6, 0.8)}),
    "cart": Space(BROAD, {"density": (0.04, 0.08, 0.16, 0.32)}),
    "star": Space(SUM, {"keep": (0.2, 0.4, 0.7)}),
    "subspace_boosting": Space(BROAD, {"beta": (0.0, 0.01, 0.05)}),
    "svc": Space(BROAD, {"of": ({"name": "task_arithmetic", "scale": 0.3}, {"name": "tsv"})}),
    "larv": Space(BROAD, {"of": ({"name": "task_arithmetic", "scale": 0.3}, {"name": "iso_c"})}),
    "orthomerge": Space(BROAD),
    "ace": Space(BROAD, {"threshold": (0.1, 0.3)}),
    "coram": Space(BROAD, {"height": (8, 64)}),
    "drm": Space(MEAN, {"density": (0.05, 0.2, 0.5)}),
    "esm": Space(BROAD, {"expert_power": (1.0, 2.0)}),
    "free": Space(SUM, {"cutoff": (0.01, 0.05)}, {"scale": 1.0}),
    "opcm": Space(BROAD, {"alpha": (0.3, 0.5, 0.7)}),
    "sa_merging": Space(BROAD, {"drop": (0.1, 0.2, 0.4)}),
    "dc_merge": Space(BROAD, {"keep": (0.1, 0.3)}),
    "wudi": Space(BROAD, {"anchor": (0.01, 0.1, 1.0)}),
    "core_space": Space(MEAN),
    "knots": Space(MEAN),
    # Gram
    "regmean": Space(BROAD, {"alpha": (0.1, 0.5, 0.9, 1.0)}),
    "lot": Space(BROAD, {"cutoff": (1e-6, 1e-3, 1e-2)}, {"scale": 1.0}),
    "bmm": Space(BROAD, {"mu": (0.01, 0.1, 1.0), "anchor": ("average", "tsv")}),
    "mats": Space(BROAD, {"alpha": (0.5, 0.9)}, {"steps": 50}),
    "fisher": Space(MEAN, {"floor": (1e-10, 1e-6)}),
    "ubgm": Space(BROAD),
    # learners: fewer steps than in the papers, with a higher rate, because of their cost
    "adamerging": Space(LEARNED, {"rate": (0.003, 0.01)}, {"steps": 60}),
    "samerging": Space(LEARNED, {"rate": (0.003, 0.01)}, {"steps": 60, "start": 0.1}),
    "greedy_soup": Space(AS_IS),
    "m_loss_coefficients": Space(MEAN),
    "neulig": Space(MEAN),
}
"""By method or learner."""

OWN = {"dare": {"agreeing": MEAN, "sum": SUM}}
"""Scales that depend on `combine`."""

LEFT_OUT: Mapping[str, str] = {
    "keep": "copies one model, so it is no merge",
}
"""Members of the family that are not run, with the reason."""


def space_of(method: str) -> Space:
    """Return the search space of a method; the default one where the table has none."""
    return SPACES.get(method, Space())


def candidates(method: str, space: Space | None = None) -> list[Candidate]:
    """Return the candidates of a method, at most `BUDGET`, always the same."""
    space = space_of(method) if space is None else space
    if len(space.scales) not in (1, BUDGET):
        raise ValueError(f"{method}: give one scale or {BUDGET}, not {len(space.scales)}")
    count = len(space.scales) if not space.choices else BUDGET
    generator = np.random.default_rng(zlib.crc32(method.encode()))
    columns: dict[str, list[Any]] = {}
    for name, values in space.choices.items():
        repeated = [values[i % len(values)] for i in range(count)]
        columns[name] = [repeated[i] for i in generator.permutation(count)]
    found: list[Candidate] = []
    for place in range(count):
        picked = {name: column[place] for name, column in columns.items()}
        scales = OWN.get(method, {}).get(picked.get("combine"), space.scales)
        found.append(Candidate({**space.fixed, **picked}, scales[place % len(scales)]))
    # neighbours share their parameters, so that one merge serves several scales
    return sorted(found, key=lambda c: (repr(sorted(c.parameters.items())), c.scale))
