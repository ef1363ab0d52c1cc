"""The command `init`: four questions, and the recipe that the answers make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergewell.cli.explain import Base, Experts

if TYPE_CHECKING:
    from mergewell.recipe import Recipe

FILE = "recipe.yaml"
"""What the recipe is called unless a name is given."""

SUGGESTED = ("average", "task_arithmetic", "ties", "tsv", "iso_c")
"""Methods that the question names; all are known."""


def init(
    base: Base = None,
    expert: Experts = None,
    method: Annotated[
        str | None, typer.Option(help="A name from `mergewell methods`; asked if absent.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the recipe.")
    ] = None,
) -> None:
    """Ask four questions, or take flags, and write a recipe."""
    from mergewell.errors import OutputError
    from mergewell.report.results import write_text

    asking = not expert
    given = _asked(base, method, out) if asking else (base, expert or [], method, out)
    base, experts, method, out = given
    target = out if out is not None else Path(FILE)
    if target.exists():
        raise OutputError(f"{target} exists already and nothing is overwritten; name another file.")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent} is no folder; make it, or name another file.")
    recipe, warnings = _checked(base, experts, method or SUGGESTED[0], target)
    write_text(target, _text(recipe, warnings))
    print(f"{target}: look at it with `mergewell plan {target}`, and ask before you merge:")
    print(f"  mergewell doctor {target}" + (f"\n  mergewell check {target}" if base else ""))
    print(f"  mergewell merge {target} --out DIR")


def _asked(
    base: str | None, method: str | None, out: Path | None
) -> tuple[str | None, list[str], str | None, Path | None]:
    """Ask for what no flag says; an answer that cannot be is asked for again."""
    base = base or _ask("1. The model that all experts came from (Enter: none)?", _path) or None
    experts: list[str] = []
    while not experts:
        answer = _ask("2. The experts, with spaces between, as PATH or PATH:coefficient?", _paths)
        experts = answer.split()
    known = f"{', '.join(SUGGESTED)}, ..."
    method = method or _ask(f"3. The method ({known}; Enter: {SUGGESTED[0]})?", _method)
    name = str(out) if out else _ask(f"4. The file to write (Enter: {FILE})?", lambda _: None)
    return base, experts, method or None, Path(name) if name else None


def _ask(question: str, check: Callable[[str], object]) -> str:
    """Return an answer that `check` does not refuse.

    Raises:
        RecipeError: nobody answers.
    """
    from mergewell.errors import RecipeError, UserError

    while True:
        try:
            answer = input(f"{question} ").strip()
        except EOFError as error:
            raise RecipeError(
                "Nobody answers; name the models with --base, --expert, --method and --out."
            ) from error
        try:
            check(answer)
        except UserError as error:
            print(error)
            continue
        return answer


def _path(answer: str) -> None:
    from mergewell.opening import open_model

    if answer:
        open_model(answer, ()).close()


def _paths(answer: str) -> None:
    from mergewell.flags import recipe_from_flags
    from mergewell.storage.folder import find_source, parts_of

    words = answer.split()
    if words:
        recipe = recipe_from_flags(base=None, experts=words, method="average", settings=[])
        for each in recipe.experts:
            # adapters are opened with their base, once both are known
            if not (Path(each.path) / "adapter_config.json").is_file():
                find_source(Path(parts_of(each.path)[0]))


def _method(answer: str) -> None:
    from mergewell.methods.base import METHODS

    if answer:
        METHODS.get(answer)


def _checked(
    base: str | None, experts: list[str], method: str, target: Path
) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe with paths as seen from its file, and what the plan warns of.

    Raises:
        UserError: the models do not fit one another, as `make_plan`.
    """
    from mergewell.flags import recipe_from_flags
    from mergewell.plan import make_plan
    from mergewell.recipe import make_recipe

    recipe = recipe_from_flags(base=base, experts=experts, method=method, settings=[])
    warnings = make_plan(recipe).warnings
    data = recipe.as_data()
    folder = target.parent.resolve()
    if folder != Path.cwd().resolve():
        data = _moved(data, folder)
    return make_recipe(data), warnings


def _moved(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    def seen(path: str) -> str:
        return "+".join(
            part if Path(part).is_absolute() else os.path.relpath(part, folder)
            for part in path.split("+")
        )

    moved = {**data, "experts": [{**e, "path": seen(e["path"])} for e in data["experts"]]}
    return moved | ({"base": seen(data["base"])} if "base" in data else {})


def _text(recipe: Recipe, warnings: tuple[str, ...]) -> str:
    """Return the recipe with its method's parameters, as remarks, and what the plan warns of."""
    method = recipe.method.build()
    about = [f"# {method.component_name()}: {method.summary()}"]
    for name, field in type(method).model_fields.items():
        help_ = " ".join((field.description or "").split())
        about.append(f"#   {name}: {getattr(method, name)!r}  {help_}")
    about += [f"# Warning: {warning}" for warning in warnings]
    return "\n".join([*about, recipe.to_yaml()])
