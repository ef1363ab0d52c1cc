"""Flags: a mistake in one names that one."""

from __future__ import annotations

from typing import Any

import pytest

from mergewell.errors import RecipeError
from mergewell.flags import from_settings, recipe_from_flags
from mergewell.methods.base import METHODS


def of(**changed: Any) -> object:
    given: dict[str, Any] = {"base": None, "experts": ["a"], "method": "ties", "settings": []}
    return recipe_from_flags(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"experts": []}, "--expert: no expert is named; name at least one with --expert PATH."),
        ({"experts": ["a", "b:nan"]}, "--expert b:nan: the coefficient must be finite"),
        ({"experts": ["a:-inf"]}, "--expert a:-inf: "),
        ({"method": "tise"}, "--method: There is no method 'tise': did you mean 'ties'?"),
        ({"dtype": "bfloat61"}, "--dtype bfloat61: did you mean 'bfloat16'?"),
        (
            {"settings": ["scale=1", "denisty=0.1"]},
            "--set denisty=0.1: method ties has no parameter 'denisty': did you mean 'density'?",
        ),
        ({"settings": ["density=2"]}, "--set density=2: method ties: density = 2 is refused"),
        ({"settings": ["density=2", "density=3"]}, "--set density=3: "),
        ({"settings": ["density=[0.1, 0]"]}, "--set density=[0.1, 0]: "),
        ({"settings": ["density"]}, "--set density: write it as key=value"),
        ({"settings": ["density=["]}, "--set density=[: the value cannot be read"),
    ],
)
def test_the_flag_is_named(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        of(**changed)
    assert str(caught.value).startswith(sentence)
    assert "flags:" not in str(caught.value) and "\n" not in str(caught.value)


def test_settings_make_any_component() -> None:
    ties = from_settings(METHODS, "ties", ["density=0.3"])
    assert ties.parameters()["density"] == 0.3
    with pytest.raises(RecipeError, match=r"^There is no method 'x'"):
        from_settings(METHODS, "x", [])


def test_a_calibration_goes_into_the_recipe() -> None:
    recipe = recipe_from_flags(
        base="b", experts=["a"], method="m_ties", settings=[], calibration="seen.safetensors"
    )
    assert recipe.calibration == "seen.safetensors"
