"""The command `schema`: the JSON schema of recipes, for editors that complete and check YAML."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any, cast

import typer

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file to write; printed if absent.")
    ] = None,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    text = json_module.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    if out is None:
        print(text, end="")
        return
    from mergewell.errors import OutputError
    from mergewell.report.results import write_text

    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} is no folder; make it, or choose another for --out.")
    write_text(out, text)
    print(f"{out}: begin a recipe with `# yaml-language-server: $schema={out}`.")


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, with every method's own parameters and their help."""
    from mergewell.methods.base import METHODS
    from mergewell.recipe import Recipe

    whole = Recipe.model_json_schema()
    parts: dict[str, Any] = whole.pop("$defs")
    choices: list[dict[str, Any]] = []
    for name in METHODS.names():
        method = METHODS.get(name)
        own = method.model_json_schema()
        parts |= own.get("$defs", {})
        choices.append(
            {
                "title": name,
                "description": method.summary(),
                "type": "object",
                "properties": {"name": {"const": name}, **own.get("properties", {})},
                "required": ["name", *own.get("required", [])],
                "additionalProperties": False,
            }
        )
    parts["MethodChoice"] = {
        "description": "A method by its name; every other key is one of its parameters.",
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"enum": list(METHODS.names())}},
        "oneOf": choices,
    }
    found = cast("dict[str, Any]", parts.pop("Recipe", whole))
    own_recipe = {k: v for k, v in found.items() if k != "title"}
    parts["Recipe"] = own_recipe
    return {
        "$schema": DIALECT,
        "title": "mergewell recipe",
        "$ref": "#/$defs/Recipe",
        "$defs": dict(sorted(parts.items())),
    }
