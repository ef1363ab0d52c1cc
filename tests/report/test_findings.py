from typing import Any

import pytest

from mergewell.report import findings
from mergewell.report.results import Check, Finding, LayerMLoss, validated


def finding(name: str, level: str, **more: Any) -> Finding:
    return Finding.model_validate(
        {"question": f"{name}?", "verdict": f"It is {name}.", "level": level} | more
    )


def check(*held: Finding, **more: Any) -> Check:
    return Check(base="b", experts=("e",), verdict="Well.", samples=8, findings=held).model_copy(
        update=more
    )


def test_findings_show_percentages_where_they_are_shares() -> None:
    def shown(value: float | None, unit: str) -> tuple[str, str]:
        finding = Finding(question="?", verdict="!", level="good", value=value, unit=unit)
        return findings.measure(finding)

    assert shown(0.334, "fraction of the mass") == ("33.4\N{NO-BREAK SPACE}%", "of the mass")
    assert shown(0.05, "relative M-Loss") == ("5.0\N{NO-BREAK SPACE}%", "M-Loss")
    assert shown(2.04, "largest / smallest norm") == ("2.04", "largest / smallest norm")
    assert shown(None, "fraction") == ("", "")
    assert shown(0.0000072, "fraction")[0] == "7.2e−4\N{NO-BREAK SPACE}%"
    assert shown(0.99973, "cosine")[0] == "0.9997"
    assert shown(0.95, "cosine")[0] == "0.950"


def test_what_decides_stands_apart_worst_first_and_the_verdict_speaks_first() -> None:
    held = check(
        finding("a", "good"),
        finding("b", "fair", decides=False),
        finding("c", "poor"),
        finding("d", "fair"),
        finding("e", "poor", decides=False),
        verdict="Expect much: it is d.",
    )
    assert [one.question for one in findings.deciding(held)] == ["d?", "c?", "a?"]
    assert [one.question for one in findings.compared(held)] == ["e?", "b?"]


def test_advice_is_given_once_and_most_important_first() -> None:
    held = check(
        finding("a", "good", advice="five"),
        finding("b", "poor", advice="three", decides=False),
        finding("c", "poor", advice="one"),
        finding("d", "fair", advice="two"),
        finding("e", "fair", advice="one"),
        finding("f", "fair", advice="six", decides=False),
    )
    assert findings.next_steps(held) == ("one", "two", "five", "three")


def test_there_is_always_something_to_do_next() -> None:
    quiet = check(finding("a", "good"))
    assert findings.next_steps(quiet) == (
        "Merge them, and judge the merge by an evaluation on every task.",
    )
    weights = check(finding("a", "poor", advice="Drop one."), samples=None)
    first, second = findings.next_steps(weights)
    assert first == "Drop one." and "--data" in second


def test_places_stand_in_the_order_of_the_network() -> None:
    names = ["h.0", "h.1", "h.10", "h.2"]
    (held,) = findings.places(check(finding("a", "good", by_place=dict.fromkeys(names, 1.0))))
    assert list(held.values) == ["h.0", "h.1", "h.2", "h.10"]
    assert held.along
    given = ["embed.1", "block.0", "head.2"]
    assert list(findings.in_order(dict.fromkeys(given, 1.0))) == given
    (pairs,) = findings.places(check(finding("a", "good", by_place={"x, y": 1.0, "x, z": 2.0})))
    assert not pairs.along
    assert findings.places(check(finding("a", "good", by_place={"h.0": 1.0}))) == ()


def row(name: str, **more: Any) -> LayerMLoss:
    data = {"layer": name, "activation": "relu", "nodes": 1, "absolute": 0, "relative": 0} | more
    return validated(LayerMLoss, data, where="row")


def test_theory_says_where_it_and_measurement_part() -> None:
    rows = [row("a", ratio=1.1), row("b", ratio=0.2), row("c", ratio=3.0), row("d")]
    held = findings.theory_layers(rows)
    assert [one.layer for one in held] == ["a", "b", "c"]
    said = findings.theory_sentence(held)
    assert said.startswith("In 1 of 3 layers")
    assert said.endswith("they part most in b, where it is 0.2 times that.")
    assert findings.theory_sentence(held[:1]).endswith("would give.")
    assert findings.theory_sentence(rows[3:]) == ""


@pytest.mark.parametrize("ratio", [0.0, 1e-12])
def test_a_gap_that_is_not_there_at_all_parts_too(ratio: float) -> None:
    assert "part most in a" in findings.theory_sentence([row("a", ratio=ratio)])
