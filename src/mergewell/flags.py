"""Flags: the recipe that a command line describes."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mergewell.component import Component, Family
from mergewell.errors import RecipeError, did_you_mean
from mergewell.methods.base import METHODS
from mergewell.recipe import DtypeName, Recipe, make_recipe
from mergewell.storage.folder import is_there

C = TypeVar("C", bound=Component)


def recipe_from_flags(
    *,
    base: str | None,
    experts: Sequence[str],
    method: str,
    settings: Sequence[str],
    seed: int = 0,
    dtype: str | None = None,
    calibration: str | None = None,
) -> Recipe:
    """Return the recipe that flags describe: `--expert PATH[:coefficient]`, `--set key=value`.

    Raises:
        RecipeError: a flag that cannot be read, or any error of `make_recipe`; says which flag.
    """
    if not experts:
        raise RecipeError("--expert: no expert is named; name at least one with --expert PATH.")
    if dtype is not None and dtype not in get_args(DtypeName):
        raise RecipeError(f"--dtype {dtype}: {did_you_mean(dtype, get_args(DtypeName))}")
    from_settings(METHODS, method, settings, named_by="--method")
    data: dict[str, Any] = {
        "experts": [_expert_flag(text) for text in experts],
        "method": {"name": method, **dict(map(_read_setting, settings))},
        "seed": seed,
    }
    if base is not None:
        data["base"] = base
    if dtype is not None:
        data["dtype"] = dtype
    if calibration is not None:
        data["calibration"] = calibration
    return make_recipe(data, where="flags")


def from_settings(
    family: Family[C],
    name: str,
    settings: Sequence[str],
    *,
    named_by: str = "",
    set_by: str = "--set",
) -> C:
    """Return the component of a name with the parameters that `--set key=value` give.

    Raises:
        RecipeError: an unknown name, which `named_by` named, or a setting of `set_by` that cannot
            be read or is refused; says which.
    """
    parameters = dict(_read_setting(setting, set_by) for setting in settings)
    try:
        family.get(name)
    except RecipeError as error:
        raise RecipeError(f"{named_by}: {error}" if named_by else str(error)) from error
    try:
        return family.build(name, parameters)
    except RecipeError as error:
        refused = error.__cause__
        place = refused.errors()[0]["loc"] if isinstance(refused, ValidationError) else ()
        guilty = [text for text in settings if place and text.startswith(f"{place[0]}=")]
        raise RecipeError(f"{' '.join([set_by, *guilty[-1:]])}: {error}") from error


def _read_setting(setting: str, flag: str = "--set") -> tuple[str, Any]:
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise RecipeError(f"{flag} {setting}: write it as key=value, such as density=0.2.")
    try:
        return key, YAML(typ="safe").load(value)
    except YAMLError as error:
        raise RecipeError(f"{flag} {setting}: the value cannot be read; quote it.") from error


def _expert_flag(text: str) -> dict[str, Any]:
    path, colon, last = text.rpartition(":")
    if not colon or is_there(Path(text)):
        return {"path": text}
    try:
        coefficient = float(last)
    except ValueError:
        return {"path": text}
    if not isfinite(coefficient):
        raise RecipeError(f"--expert {text}: the coefficient must be finite; give a number.")
    return {"path": path, "coefficient": coefficient}
