"""What is searched for each method: the same number of candidates for all of them.

A candidate is a choice of the method's parameters and a *scale*, a factor on the merged task
vector: result = base + scale * (merged - base). Where a method has such a factor itself it is held
at 1 (`fixed`), so that one merge serves many scales. Candidates are a Latin hypercube: each of the
`BUDGET` scales is taken once, each value of a parameter as often as any other, in a random order
that depends on the method's name alone. What is searched for a method is its own `search`; the
table below holds the learners, which have none, and what differs, with the reason. A row's key has
its parameters and scale, so that a changed space leaves the rows of candidates that stay.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergewell.methods.base import METHODS

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


SPACES: Mapping[str, Space] = {
    # methods whose own `search` names no scale, which would leave them their default size
    "average": Space(AS_IS),  # the reference that nothing is tuned of
    "fisher": Space(MEAN, {"floor": (1e-10, 1e-6)}),
    "karcher": Space(MEAN),
    "multislerp": Space(MEAN),
    # it shrinks task vectors by how little the experts agree, here to a few per cent
    "model_stock": Space((0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 11.0, 15.0, 20.0)),
    # its own search has the scale under another name
    "wise_ft": Space(MEAN, fixed={"t": 1.0}),
    # learners, which name no search: fewer steps than in the papers, with a higher rate, because
    # of their cost
    "adamerging": Space(LEARNED, {"rate": (0.003, 0.01)}, {"steps": 60}),
    "adarank": Space(
        LEARNED,
        {"mask_rate": (0.01, 0.02), "learn_from": ("entropy", "expert")},
        {"steps": 60, "rate": 0.01},
    ),
    "concrete": Space(LEARNED, {"rate": (0.03, 0.1), "start": (0.15, 0.3)}, {"steps": 60}),
    "df_merge": Space(
        LEARNED, {"bound": (0.1, 0.15, 0.3)}, {"random": 10, "steps": 20, "samples": 4}
    ),
    "distillation": Space(LEARNED, {"rate": (5e-5, 2e-4, 5e-4), "steps": (20, 100)}),
    "dwise_ft": Space(LEARNED, {"rate": (0.01, 0.03)}, {"steps": 60}),
    "greedy_soup": Space(AS_IS),
    "lorahub": Space(LEARNED, {"penalty": (0.0, 0.05)}),
    "m_loss_coefficients": Space(MEAN),
    "neulig": Space(MEAN),
    "prodistill": Space(LEARNED, {"rate": (0.01, 0.05, 0.2), "epochs": (3, 20)}),
    "samerging": Space(LEARNED, {"rate": (0.003, 0.01)}, {"steps": 60, "start": 0.1}),
}
"""By method or learner, where `space_of` does not derive it."""

OWN = {"dare": {"agreeing": MEAN, "sum": SUM}}
"""Scales that depend on `combine`."""

_COMPANION = "its models have parts of each task's own, and here one model answers every task"
LEFT_OUT: Mapping[str, str] = {
    "keep": "copies one model, so it is no merge",
    "surgery": _COMPANION,
    "surgery_v2": _COMPANION,
    "symerge": _COMPANION,
}
"""Members of the family that are not run, with the reason."""


def space_of(method: str) -> Space:
    """Return the search space of a method: of `SPACES`, or else derived from its own `search`.

    The scales are those that it names, or else `BROAD`; where its default is not
    1 the parameter is held there. What is neither in the table nor a method gets the default space.
    """
    if method in SPACES or method not in METHODS.names():
        return SPACES.get(method, Space())
    cls = METHODS.get(method)
    choices = dict(cls.search)
    if "scale" not in choices:
        return Space(BROAD, choices)
    held = {} if cls.model_fields["scale"].default == 1.0 else {"scale": 1.0}
    return Space(choices.pop("scale"), choices, held)


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
