"""A bound of the risk of averaged experts: four terms, and how each answers to each knob.

    risk <~ mean f_i(x_i)  +  (L/2) V  +  sqrt(2 L R eps2)  +  (L/2) eps2

f_i(x_i) is expert i's own loss, V = mean ||x_i - x||^2 how far experts are from their average x, R
the average's loss, eps2 = mean Delta_i^2 / N^2 how much the average moves when one training example
is another; Delta_i^2 = 4 e m_i^2 K_i (1 + E_i) / (n_i b_i) with m_i the length of one step.

Source: papers.md section 4.2, derived there: a bound of the same family as that of
arXiv:2601.21690, whose own statement could not be read. Departures: constants are loose, so that
terms are compared with each other and are no forecast; the factor exp(2 L eta K) and the experts'
remaining gradients are left out; without a measured gradient m_i = ||task vector|| / K, what all
steps together made, which holds for adaptive optimisers as well and is a lower end.

Shapes: N experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import e as EULER
from math import sqrt
from typing import Literal

from torch import Tensor

from mergewell.advise.settings import Known, Sourced

TermName = Literal["training", "heterogeneity", "stability_root", "stability"]
KNOBS = ("learning_rate", "steps", "batch_size", "samples", "experts")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of the experts, by source; all sequences have one entry an expert."""

    names: Sequence[str]
    known: Sequence[Known]
    products: Tensor | None = None
    """Inner products of the base and the task vectors, [N + 1, N + 1]."""
    losses: Sequence[Sourced] | None = None
    """f_i(x_i) in nats."""
    curvatures: Sequence[Sourced] | None = None
    """L_i, nats per squared length."""
    merged: Sequence[Sourced] | None = None
    """f_i(x), the average's loss on each task, nats."""
    gradients: Sequence[float] | None = None
    """Mean squared norm of the gradient of one sample, G_i^2."""


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the bound."""

    name: TermName
    what: str
    value: float | None
    source: str
    """What the value was made from, or what is missing."""
    shares: Mapping[str, float]
    """Each expert's part of it; empty where unknown."""
    elasticity: Mapping[str, float]
    """Percent that it changes where a knob is turned up by one percent in all experts."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The four terms, in one unit."""

    terms: Sequence[Term]
    unit: str

    @property
    def merging(self) -> Sequence[Term]:
        """The terms that merging adds and that have a value: all but the experts' own loss."""
        return [t for t in self.terms if t.name != "training" and t.value is not None]

    @property
    def dominating(self) -> Term | None:
        """The largest term that merging adds."""
        return max(self.merging, key=lambda term: term.value or 0.0, default=None)

    def elasticity(self) -> dict[str, float]:
        """Return percent of what merging adds for one percent of each knob."""
        total = sum(term.value or 0.0 for term in self.merging)
        if total <= 0:
            return {}
        parts = [(term.value or 0.0, term.elasticity) for term in self.merging]
        return {knob: sum(v * e.get(knob, 0.0) for v, e in parts) / total for knob in KNOBS}


def bound(evidence: Evidence) -> Bound:
    """Return the terms, each from the best source there is; nothing is made up.

    Without a curvature only terms that are proportional to it are known, in units of it.
    """
    squares, spread, of_lengths = lengths(evidence)
    curvature = evidence.curvatures
    scale = [one.value for one in curvature] if curvature is not None else [1.0] * len(squares)
    count = len(evidence.names)
    moves, epochs, of_moves = _sensitivities(evidence, squares)
    half = [c / 2 * apart / count for c, apart in zip(scale, spread, strict=False)]
    shaken = [c / 2 * one / count for c, one in zip(scale, moves, strict=False)]
    by = f" × {curvature[0].source}" if curvature is not None else ""
    risk = _risk(evidence, half)
    terms = [
        _training(evidence),
        Term(
            "heterogeneity", "experts apart from their average, (L/2) V",
            sum(half) if half else None, f"{of_lengths}{by if half else ''}",
            _shares(evidence.names, half),
            {"learning_rate": 2.0, "steps": 2.0, "experts": 1 / max(1, count - 1)},
        ),
        _root(evidence, shaken, risk, epochs, of_moves),
        Term(
            "stability", "what one example moves, (L/2) eps2",
            sum(shaken) if shaken else None, f"{of_moves}{by if shaken else ''}",
            _shares(evidence.names, shaken), _of_sensitivity(epochs),
        ),
    ]  # fmt: skip
    scaled = "nats" if curvature is not None else "L (the curvature is not known)"
    unit = scaled if evidence.products is not None else f"{scaled} × squared gradient"
    return Bound(terms, unit)


def lengths(evidence: Evidence) -> tuple[list[float], list[float], str]:
    """Return ||tau_i||^2 and ||x_i - x||^2 of each expert, and the source; empty if unknown."""
    count = len(evidence.names)
    if evidence.products is not None:
        taus = evidence.products[1:, 1:]
        mean = float(taus.mean())
        squares = [float(one) for one in taus.diagonal()]
        crossed = [float(one) for one in taus.mean(1)]
        apart = [max(0.0, s - 2 * c + mean) for s, c in zip(squares, crossed, strict=True)]
        return squares, apart, "checkpoints"
    paths = [_path(known) for known in evidence.known]
    if not paths or any(path is None for path in paths):
        return [], [], "missing: checkpoints, or learning rate and steps of every expert"
    squares = [path**2 for path in paths if path is not None]
    whole = sum(squares) / count**2
    apart = [s * (1 - 2 / count) + whole for s in squares]
    return squares, apart, "settings (rate × steps, as if task vectors were orthogonal)"


def _path(known: Known) -> float | None:
    rate, steps = known.value("learning_rate"), known.value("steps")
    return None if rate is None or steps is None else rate * steps


def _sensitivities(
    evidence: Evidence, squares: Sequence[float]
) -> tuple[list[float], list[float], str]:
    """Return Delta_i^2 / N^2 and the epochs of each expert, and the source; empty if unknown."""
    found: list[float] = []
    epochs: list[float] = []
    source = "settings" if evidence.products is None else "settings, checkpoints"
    for place, known in enumerate(evidence.known):
        steps, batch, samples = (known.value(n) for n in ("steps", "batch_size", "samples"))
        if steps is None or batch is None or samples is None or not squares:
            what = "lengths" if not squares else "steps, batch size and samples of every expert"
            return [], [], f"missing: {what}"
        passes = steps * batch / samples
        move = squares[place] / steps**2
        rate = known.value("learning_rate")
        if evidence.gradients is not None and rate is not None and known.optimiser == "sgd":
            move, source = rate**2 * evidence.gradients[place], "settings, labels"
        moved = 4 * EULER * move * steps * (1 + passes) / (samples * batch)
        found.append(moved / len(evidence.known) ** 2)
        epochs.append(passes)
    return found, epochs, source


def _of_sensitivity(epochs: Sequence[float]) -> dict[str, float]:
    """Return the elasticities of eps2 (papers.md 4.2.2)."""
    if not epochs:
        return {}
    passes = sum(epochs) / len(epochs)
    again = passes / (1 + passes)
    return {
        "learning_rate": 2.0, "steps": 1 + again, "batch_size": again - 1, "samples": -(1 + again),
        "experts": -2.0,
    }  # fmt: skip


def _training(evidence: Evidence) -> Term:
    losses = evidence.losses
    value = None if losses is None else sum(one.value for one in losses) / len(losses)
    parts = [] if losses is None else [one.value / len(losses) for one in losses]
    return Term(
        "training", "the experts' own loss, before any merging", value,
        "missing: data, or a trainer's log" if losses is None else losses[0].source,
        _shares(evidence.names, parts), {},
    )  # fmt: skip


def _risk(evidence: Evidence, half: Sequence[float]) -> Sourced | None:
    """Return the average's loss: measured, or what the first two terms allow for."""
    if evidence.merged is not None:
        values = [one.value for one in evidence.merged]
        return Sourced(sum(values) / len(values), evidence.merged[0].source)
    if evidence.losses is None or evidence.curvatures is None or not half:
        return None
    own = sum(one.value for one in evidence.losses) / len(evidence.losses)
    return Sourced(own + sum(half), f"{evidence.losses[0].source}, terms 1 and 2")


def _root(
    evidence: Evidence,
    shaken: Sequence[float],
    risk: Sourced | None,
    epochs: Sequence[float],
    of_moves: str,
) -> Term:
    what = "one example's part in the average's loss, sqrt(2 L R eps2)"
    halved = {knob: value / 2 for knob, value in _of_sensitivity(epochs).items()}
    if risk is None or evidence.curvatures is None or not shaken:
        lacks = of_moves if not shaken else "missing: a curvature and the average's loss"
        return Term("stability_root", what, None, lacks, {}, halved)
    value = sqrt(4 * risk.value * sum(shaken))
    parts = [value * one / max(sum(shaken), 1e-300) for one in shaken]
    source = f"{of_moves} × {risk.source}"
    return Term(
        "stability_root", what, value, source, _shares(evidence.names, parts), halved
    )  # fmt: skip


def _shares(names: Sequence[str], parts: Sequence[float]) -> dict[str, float]:
    total = sum(parts)
    if total <= 0:
        return {}
    return {name: part / total for name, part in zip(names, parts, strict=True)}
