"""Every method against every law it is subject to, every law against a method that breaks it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from laws import ALWAYS, BREAKERS, UNLESS_SAID, Breaker, Law, group_of

from mergewell.methods.base import METHODS, MergeMethod


def variants(name: str) -> list[MergeMethod]:
    """Return the method at its defaults and at every value of each typed choice."""
    cls = METHODS.get(name)
    choices: dict[str, list[Any]] = {}
    for field, info in cls.model_fields.items():
        if get_origin(info.annotation) is Literal:
            choices[field] = list(get_args(info.annotation))
        elif info.annotation is bool:
            choices[field] = [True, False]
    settings = [{}, *({field: v} for field, values in choices.items() for v in values)]
    built = [cls.model_validate(setting) for setting in settings]
    # a whole-model threshold cannot be made from one tensor: tests/test_run.py covers it
    return [m for m in dict.fromkeys(built) if all(s.scope == "tensor" for s in m.statistics())]


CASES = [(law, m) for name in METHODS.names() for law in ALWAYS for m in variants(name)] + [
    (law, method)
    for name, law in itertools.product(METHODS.names(), UNLESS_SAID)
    for method in variants(name)
    if not getattr(method.laws, law.__name__)
]


def case_id(value: object) -> str:
    if isinstance(value, MergeMethod):
        return f"{value.component_name()}({', '.join(map(str, value.parameters().values()))})"
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("law", "method"), CASES, ids=case_id)
def test_method_keeps_the_law(law: Law, method: MergeMethod) -> None:
    law(method)


@pytest.mark.parametrize(
    "breaker", BREAKERS, ids=lambda b: f"{b.law.__name__}-{type(b.method).__name__}"
)
def test_law_catches_a_method_that_breaks_it(breaker: Breaker) -> None:
    with pytest.raises(AssertionError):
        breaker.law(breaker.method)


def test_every_law_has_a_breaker() -> None:
    assert {law.__name__ for law in (*ALWAYS, *UNLESS_SAID)} == {b.law.__name__ for b in BREAKERS}


@pytest.mark.parametrize("name", METHODS.names())
def test_opting_out_takes_a_sentence(name: str) -> None:
    laws = METHODS.get(name).laws
    for law in UNLESS_SAID:
        sentence = getattr(laws, law.__name__)
        assert not sentence or (sentence.endswith(".") and len(sentence.split()) > 3)


@pytest.mark.parametrize("name", [n for n in METHODS.names() if "scale" in METHODS.get(n).search])
def test_the_task_vector_is_linear_in_a_searched_scale(name: str) -> None:
    one, three = (METHODS.build(name, {"scale": scale}) for scale in (1.0, 3.0))
    for shape in [(7,), (5, 3)]:
        group = group_of(one, shape, dtype=torch.float64)
        made = {kind: kind.measure([group])[group.name] for kind in one.statistics()}
        group = replace(group, statistics=made)
        base = group.required_base
        assert torch.allclose(three.merge(group) - base, 3 * (one.merge(group) - base), atol=1e-12)


@pytest.mark.parametrize("name", METHODS.names())
def test_what_is_searched_is_accepted(name: str) -> None:
    for parameter, values in METHODS.get(name).search.items():
        for value in values:
            METHODS.build(name, {parameter: value})
