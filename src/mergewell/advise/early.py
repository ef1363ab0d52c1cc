"""Which checkpoint of each run should be merged: the one that makes the bound least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAST = -1
"""Stands for the expert itself among its run's checkpoints."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint of one expert's run, with every other expert as it is."""

    step: int
    """Or LAST."""
    distance: float
    """||task vector||^2 over that of the expert."""
    apart: float
    """V of the merge with this checkpoint in the expert's place over V as it is."""
    loss: float | None
    """The checkpoint's own loss, nats."""
    total: float | None
    """Mean loss of the experts + (L/2) V, nats; None where losses are not known."""


@dataclass(frozen=True, slots=True)
class EarlyChoice:
    """The checkpoints of one expert's run, in their order, the expert last."""

    expert: str
    candidates: Sequence[Candidate]

    @property
    def best(self) -> Candidate | None:
        """The candidate with the least total; None where none is known."""
        known = [one for one in self.candidates if one.total is not None]
        return min(known, key=lambda one: one.total or 0.0) if known else None


def choose(
    names: Sequence[str],
    products: Tensor,
    places: Sequence[Mapping[int, int]],
    *,
    curvatures: Sequence[float] | None,
    losses: Sequence[float] | None,
    early: Sequence[Mapping[int, float]] | None,
) -> tuple[EarlyChoice, ...]:
    """Return what each earlier checkpoint would change, one expert at a time.

    `products` are inner products of the task vectors of the N experts and then of all earlier
    checkpoints; `places[i]` says by step where those of expert i's run stand.
    """
    count = len(names)
    found: list[EarlyChoice] = []
    now = list(range(count))
    whole = _apart(products, now)
    for place, name in enumerate(names):
        if not places[place]:
            continue
        candidates: list[Candidate] = []
        for step, at in (*sorted(places[place].items()), (LAST, place)):
            chosen = [at if other == place else other for other in now]
            apart = _apart(products, chosen)
            loss = None if losses is None else losses[place]
            if step != LAST:
                loss = None if early is None else early[place].get(step)
            total = None
            if loss is not None and losses is not None and curvatures is not None:
                own = sum(losses) - losses[place] + loss
                bend = sum(c / 2 * one for c, one in zip(curvatures, apart, strict=True))
                total = (own + bend) / count
            candidates.append(
                Candidate(
                    step,
                    float(products[at, at] / products[place, place].clamp(min=1e-300)),
                    sum(apart) / max(sum(whole), 1e-300),
                    loss,
                    total,
                )
            )
        found.append(EarlyChoice(name, candidates))
    return tuple(found)


def _apart(products: Tensor, chosen: Sequence[int]) -> list[float]:
    """Return ||x_i - x||^2 of each of some models, x their average."""
    index = torch.tensor(chosen)
    taus = products[index][:, index]
    apart = taus.diagonal() - 2 * taus.mean(1) + taus.mean()
    return [max(0.0, float(one)) for one in apart]
