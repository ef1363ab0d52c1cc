"""Flags: the recipe that a command line describes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mergewell.errors import RecipeError
from mergewell.recipe import Recipe, make_recipe
from mergewell.storage.folder import is_there


def recipe_from_flags(
    *,
    base: str | None,
    experts: Sequence[str],
    method: str,
    settings: Sequence[str],
    seed: int = 0,
    dtype: str | None = None,
) -> Recipe:
    """Return the recipe that flags describe: `--expert PATH[:coefficient]`, `--set key=value`.

    Raises:
        RecipeError: a flag that cannot be read, or any error of `make_recipe`.
    """
    parameters: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {setting}: write it as key=value, such as density=0.2.")
        try:
            parameters[key] = YAML(typ="safe").load(value)
        except YAMLError as error:
            raise RecipeError(f"--set {setting}: the value cannot be read; quote it.") from error
    data: dict[str, Any] = {
        "experts": [_expert_flag(text) for text in experts],
        "method": {"name": method, **parameters},
        "seed": seed,
    }
    if base is not None:
        data["base"] = base
    if dtype is not None:
        data["dtype"] = dtype
    return make_recipe(data, where="flags")


def _expert_flag(text: str) -> dict[str, Any]:
    path, colon, last = text.rpartition(":")
    if colon and not is_there(Path(text)):
        try:
            return {"path": path, "coefficient": float(last)}
        except ValueError:
            pass
    return {"path": text}
