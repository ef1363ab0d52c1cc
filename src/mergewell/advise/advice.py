"""Advice: the bound's terms, which one dominates, and what to do about it, each with its source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from mergewell.advise.bound import KNOBS, Bound, Evidence, bound
from mergewell.advise.early import LAST, EarlyChoice

Direction = Literal["lower", "raise", "no effect"]
Verdict = Literal["agrees", "disagrees", "mixed", "open", "not measured"]

WORDS = {
    "learning_rate": "learning rate", "steps": "steps", "batch_size": "batch size",
    "samples": "training examples", "experts": "number of experts",
}  # fmt: skip
LITTLE = 0.05
"""Elasticity below which a knob is said to have no effect."""
UNEQUAL = 1.5
"""How many times its equal share of a term an expert must have to be named."""
LOOSE = (
    "A bound of the same family as arXiv:2601.21690; constants are loose: compare the terms with "
    "each other, they are no forecast."
)


@dataclass(frozen=True, slots=True)
class Effect:
    """What turning a knob up did to merges of the atlas, in one family; points, 95 % interval."""

    effect: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1, -1, or 0 where the interval holds 0."""
        return 0 if self.low <= 0 <= self.high else (1 if self.effect > 0 else -1)


@dataclass(frozen=True, slots=True)
class Knob:
    """One thing that can be turned when experts are fine-tuned."""

    name: str
    elasticity: float
    """Percent of what merging adds to the bound, for one percent more."""
    retention: Mapping[str, Effect]
    """Measured effect of doubling it on retention, by family of the atlas."""
    accuracy: Mapping[str, Effect]
    """The same on the merged accuracy itself."""

    @property
    def direction(self) -> Direction:
        """What the bound advises."""
        if abs(self.elasticity) < LITTLE:
            return "no effect"
        return "lower" if self.elasticity > 0 else "raise"

    @property
    def verdict(self) -> Verdict:
        """Whether the atlas bears the bound's direction out."""
        if not self.retention:
            return "not measured"
        wanted = 0 if self.direction == "no effect" else (1 if self.direction == "raise" else -1)
        signs = {one.sign for one in self.retention.values()} - {0}
        if not signs:
            return "open"
        if len(signs) > 1:
            return "mixed"
        return "agrees" if signs == {wanted} else "disagrees"


@dataclass(frozen=True, slots=True)
class Advice:
    """What `mergewell advise` says."""

    evidence: Evidence
    bound: Bound
    knobs: Sequence[Knob]
    """The strongest first."""
    early: Sequence[EarlyChoice]
    sentences: Sequence[str]

    def as_data(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        dominating = self.bound.dominating
        return {
            "version": 1,
            "bound": LOOSE,
            "experts": list(self.evidence.names),
            "settings": [
                {n: {"value": s.value, "source": s.source} for n, s in one.numbers.items()}
                for one in self.evidence.known
            ],
            "unit": self.bound.unit,
            "terms": [
                {
                    "name": term.name, "what": term.what, "value": term.value,
                    "source": term.source, "shares": dict(term.shares),
                    "elasticity": dict(term.elasticity),
                }
                for term in self.bound.terms
            ],
            "dominating": None if dominating is None else dominating.name,
            "knobs": [
                {
                    "name": knob.name, "direction": knob.direction, "elasticity": knob.elasticity,
                    "atlas": knob.verdict, "retention": _plain(knob.retention),
                    "merged_accuracy": _plain(knob.accuracy),
                }
                for knob in self.knobs
            ],
            "early": [
                {
                    "expert": one.expert, "best": one.best and _step(one.best.step),
                    "checkpoints": [
                        {
                            "step": _step(c.step), "distance": c.distance, "apart": c.apart,
                            "loss": c.loss, "total": c.total,
                        }
                        for c in one.candidates
                    ],
                }
                for one in self.early
            ],
            "advice": list(self.sentences),
        }  # fmt: skip


def advise(evidence: Evidence, early: Sequence[EarlyChoice] = ()) -> Advice:
    """Return advice on experts, made or planned, from what is known of them."""
    found = bound(evidence)
    measured = atlas()["effects"]
    elasticity = found.elasticity()
    knobs = sorted(
        (
            Knob(
                name,
                elasticity[name],
                _effects(measured.get(name, {}), "retention"),
                _effects(measured.get(name, {}), "merged_accuracy"),
            )
            for name in (KNOBS if elasticity else ())
        ),
        key=lambda knob: -abs(knob.elasticity),
    )
    sentences = [*_of_terms(found), *_of_knobs(knobs), *_of_experts(found), *_of_early(early)]
    return Advice(evidence, found, knobs, early, sentences)


@cache
def atlas() -> dict[str, Any]:
    """Return what was measured on the atlas (docs/studies/advice.md)."""
    text = files("mergewell.advise").joinpath("atlas.json").read_text(encoding="utf-8")
    return json.loads(text)


def _effects(told: Mapping[str, Any], outcome: str) -> dict[str, Effect]:
    return {
        family: Effect(one[outcome]["effect"], one[outcome]["low"], one[outcome]["high"])
        for family, one in told.items()
    }


def _of_terms(found: Bound) -> list[str]:
    largest = found.dominating
    if largest is None:
        lacking = next(term.source for term in found.terms if term.name == "heterogeneity")
        return [f"Nothing can be compared yet ({lacking})."]
    total = sum(term.value or 0.0 for term in found.merging)
    if total <= 0:
        return ["The experts do not differ from one another: merging adds nothing to their loss."]
    share = 100 * (largest.value or 0.0) / total
    left = [str(i) for i, term in enumerate(found.terms, 1) if term.value is None]
    beside = f"; term {' and '.join(left)} could not be made" if left else ""
    return [
        f"Of what merging adds to the bound, {share:.0f} % is {largest.what} "
        f"(from {largest.source}{beside})."
    ]


def _of_knobs(knobs: Sequence[Knob]) -> list[str]:
    """Return what to turn first, what else is worth turning, and where the atlas disagrees."""
    if not knobs:
        return []
    first, *rest = (knob for knob in knobs if knob.direction != "no effect")
    lines = [
        f"Best knob: {first.direction} the {WORDS[first.name]}: 1 % changes what merging adds by "
        f"{abs(first.elasticity):.1f} % (bound). {_measured(first)}"
    ]
    if first.name in ("learning_rate", "steps") and first.direction == "lower":
        lines.append(
            "Less rate or fewer steps also leave the experts less trained, which term 1 and not "
            "retention shows: what counts in the end is the merged accuracy."
        )
    agreed = [knob for knob in rest if knob.verdict == "agrees"]
    lines += [
        f"Also: {knob.direction} the {WORDS[knob.name]} (bound). {_measured(knob)}"
        for knob in agreed[:2]
    ]
    lines += [
        f"Against the bound, which says {knob.direction}: {_measured(knob)} Go by the measurement "
        "where models are alike."
        for knob in knobs
        if knob.verdict in ("disagrees", "mixed") and knob is not first
    ]
    return lines


def _measured(knob: Knob) -> str:
    """Return what doubling a knob did on the atlas, to retention and to the merged accuracy."""
    word = WORDS[knob.name]
    clear = {family: one for family, one in knob.retention.items() if one.sign}
    if not knob.retention:
        return f"The atlas has not measured the {word}."
    if not clear:
        return f"The atlas shows no clear effect of the {word} on retention."
    told = ", ".join(
        f"{one.effect:+.1f} points of retention [{one.low:.1f}, {one.high:.1f}] and "
        f"{knob.accuracy[family].effect:+.1f} of merged accuracy in {family}"
        for family, one in clear.items()
    )
    silent = [family for family in knob.retention if family not in clear]
    beside = f", nothing clear in {', '.join(silent)}" if silent else ""
    return f"Atlas, {word} doubled: {told}{beside} ({knob.verdict})."


def _of_experts(found: Bound) -> list[str]:
    """Return which expert has far more than its share of the dominating term."""
    largest = found.dominating
    if largest is None or len(largest.shares) < 2:
        return []
    name, share = max(largest.shares.items(), key=lambda pair: pair[1])
    if share * len(largest.shares) < UNEQUAL:
        return []
    return [
        f"{name} alone makes {100 * share:.0f} % of that term: train it with less rate × steps, "
        f"take an earlier checkpoint of it, or lower its coefficient (from {largest.source})."
    ]


def _of_early(early: Sequence[EarlyChoice]) -> list[str]:
    lines: list[str] = []
    for one in early:
        best = one.best
        if best is None:
            least = min(one.candidates, key=lambda c: c.apart)
            lines.append(
                f"{one.expert}: {_named(least.step)} brings V to {100 * least.apart:.0f} % "
                "(checkpoints), but what it loses on its own task is not known: add --data."
            )
        elif best.step == LAST:
            lines.append(
                f"{one.expert}: keep the last checkpoint; earlier ones lose more on their own task "
                "than they take off the heterogeneity (terms 1 and 2)."
            )
        else:
            lines.append(
                f"{one.expert}: {_named(best.step)} makes terms 1 and 2 together least, with V at "
                f"{100 * best.apart:.0f} % of what it is (losses on its inputs)."
            )
    late = _effects(atlas()["effects"].get("late", {}), "retention") if early else {}
    accuracy = _effects(atlas()["effects"].get("late", {}), "merged_accuracy")
    told = [
        f"{one.effect:+.1f} points of retention and {accuracy[family].effect:+.1f} of merged "
        f"accuracy in {family}"
        for family, one in late.items()
    ]
    if told:
        lines.append(f"Atlas, the end of a run, not a checkpoint early in it: {', '.join(told)}.")
    return lines


def _named(step: int) -> str:
    return "the last checkpoint" if step == LAST else f"the checkpoint of step {step}"


def _step(step: int) -> int | str:
    return "last" if step == LAST else step


def _plain(effects: Mapping[str, Effect]) -> dict[str, dict[str, float]]:
    return {f: {"effect": e.effect, "low": e.low, "high": e.high} for f, e in effects.items()}
