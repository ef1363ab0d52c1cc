"""The bound's terms by hand, and its elasticities against differences."""

from __future__ import annotations

from math import e, log, sqrt

import pytest
import torch

from mergewell.advise.advice import Effect, Knob, advise
from mergewell.advise.bound import Bound, Evidence, bound
from mergewell.advise.settings import Known, Sourced


def known(**numbers: float) -> Known:
    return Known({name: Sourced(value, "file") for name, value in numbers.items()})


def values(found: Bound) -> list[float | None]:
    return [term.value for term in found.terms]


PLAN = {"learning_rate": 0.1, "steps": 10.0, "batch_size": 4.0, "samples": 20.0}
# orthogonal task vectors of squared length 4 and 16, the base of squared length 1
PRODUCTS = torch.tensor([[1.0, 0.5, 0.5], [0.5, 4.0, 0.0], [0.5, 0.0, 16.0]])


def test_settings_alone_by_hand() -> None:
    found = bound(Evidence(["a", "b"], [known(**PLAN), known(**PLAN)]))
    # lengths (0.1 * 10)^2 = 1, V = 1 - 1/2; Delta^2 = 4e * 0.01 * 10 * (1 + 2) / 80, over N^2 = 4
    assert values(found)[0] is None and values(found)[2] is None
    assert values(found)[1] == pytest.approx(0.25)
    assert values(found)[3] == pytest.approx(0.5 * 4 * e * 0.01 * 10 * 3 / 80 / 4)
    assert "curvature is not known" in found.unit and "squared gradient" in found.unit
    assert found.dominating is not None and found.dominating.name == "heterogeneity"


def test_checkpoints_losses_and_curvature_by_hand() -> None:
    losses = [Sourced(0.2, "labelled"), Sourced(0.4, "labelled")]
    bends = [Sourced(0.5, "labelled"), Sourced(0.1, "labelled")]
    merged = [Sourced(0.5, "labelled"), Sourced(0.7, "labelled")]
    evidence = Evidence(
        ["a", "b"], [known(**PLAN)] * 2, PRODUCTS, losses=losses, curvatures=bends, merged=merged
    )
    found = bound(evidence)
    # the average lies (4 + 16) / 4 = 5 from the base and from both experts
    assert values(found)[:2] == pytest.approx([0.3, (0.25 * 5 + 0.05 * 5) / 2])
    moved = [4 * e * length / 100 * 10 * 3 / 80 / 4 for length in (4, 16)]
    shaken = (0.25 * moved[0] + 0.05 * moved[1]) / 2
    assert values(found)[3] == pytest.approx(shaken)
    assert values(found)[2] == pytest.approx(sqrt(4 * 0.6 * shaken))
    assert found.unit == "nats"
    assert found.terms[1].shares == pytest.approx({"a": 0.25 / 0.3, "b": 0.05 / 0.3})


def test_elasticities_are_those_of_the_terms() -> None:
    """Settings alone: turning a knob up by a little changes every term as it says."""
    once = bound(Evidence(["a", "b", "c"], [known(**PLAN)] * 3))
    for knob in ("learning_rate", "steps", "batch_size", "samples"):
        more = known(**{**PLAN, knob: PLAN[knob] * 1.0001})
        again = bound(Evidence(["a", "b", "c"], [more] * 3))
        for before, after in zip(once.merging, again.merging, strict=True):
            assert before.value is not None and after.value is not None
            slope = log(after.value / before.value) / log(1.0001)
            assert slope == pytest.approx(before.elasticity.get(knob, 0.0), abs=1e-3)


def test_what_is_missing_is_said_and_nothing_is_made_up() -> None:
    found = bound(Evidence(["a"], [known(steps=3.0)]))
    assert values(found) == [None] * 4
    assert "learning rate and steps of every expert" in found.terms[1].source
    assert advise(Evidence(["a"], [known(steps=3.0)])).sentences[0].startswith("Nothing can be")
    half = bound(Evidence(["a", "b"], [known(), known()], PRODUCTS))
    assert half.terms[1].value == 2.5
    assert half.terms[3].source == "missing: steps, batch size and samples of every expert"


def test_advice_names_the_largest_term_the_knob_and_the_odd_expert() -> None:
    products = torch.diag(torch.tensor([1.0, 1.0, 1.0, 400.0]))
    found = advise(Evidence(["a", "b", "c"], [known(**PLAN)] * 3, products))
    assert found.knobs[0].name in ("learning_rate", "steps")
    assert "% is experts apart from their average" in found.sentences[0]
    assert "Best knob: lower the" in found.sentences[1] and "Atlas" in found.sentences[1]
    # apart from the mean: (40 / 3)^2 + 2 / 9 = 178 of 178 + 2 * 45
    assert found.sentences[-1].startswith("c alone makes 66 % of that term")
    data = found.as_data()
    assert data["dominating"] == "heterogeneity" and len(data["terms"]) == 4
    same = advise(Evidence(["a", "b"], [known(), known()], torch.ones(3, 3)))
    assert "do not differ" in same.sentences[0] and not same.knobs


def test_verdicts_of_the_atlas() -> None:
    up, down, none = Effect(1, 0.5, 2), Effect(-1, -2, -0.5), Effect(1, -1, 3)
    lower = Knob("steps", 2.0, {"x": down, "y": none}, {})
    assert (lower.direction, lower.verdict) == ("lower", "agrees")
    assert Knob("steps", -2.0, {"x": down}, {}).verdict == "disagrees"
    assert Knob("steps", 2.0, {"x": down, "y": up}, {}).verdict == "mixed"
    assert Knob("steps", 2.0, {"y": none}, {}).verdict == "open"
    assert Knob("steps", 0.0, {"x": down}, {}).verdict == "disagrees"
    assert Knob("steps", 0.0, {}, {}).verdict == "not measured"
