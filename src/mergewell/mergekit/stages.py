"""Several mergekit configurations in one file, of which one merges what the others make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergewell.errors import RecipeError
from mergewell.mergekit.config import read_config, stage_names
from mergewell.mergekit.convert import recipe_from_mergekit
from mergewell.recipe import Recipe


def recipe_from_documents(
    documents: Sequence[Mapping[str, Any]], *, where: str, base_dir: Path
) -> Recipe:
    """Return the recipe of one configuration, or of the last of several with the rest as stages.

    A document's `name` (mergekit-multi) or `out_path` (mergekit-mega) is what others call its
    result. The one that no other merges is the recipe; their order does not matter.

    Raises:
        RecipeError: a name that stands twice, results that merge one another, or several that
            none merges; and as `recipe_from_mergekit`.
    """
    if len(documents) == 1:
        return recipe_from_mergekit(documents[0], where=where, base_dir=base_dir)
    names = [stage_names(document) for document in documents]
    owners: dict[str, int] = {}
    for index, given in enumerate(names):
        for name in given:
            if owners.setdefault(name, index) != index:
                raise RecipeError(f"{where}: two documents are called {name!r}; rename one.")
    users = {
        index: {owners[part] for model in _models(document, where, base_dir, owners)
                for part in (model, *model.split("+")) if part in owners}
        for index, document in enumerate(documents)
    }  # fmt: skip
    last = sorted({*users} - {used for found in users.values() for used in found})
    if len(last) != 1:
        which = ", ".join(repr(names[i][0]) if names[i] else f"document {i + 1}" for i in last)
        several = f"{which} are each merged by no other" if last else "they merge each other"
        raise RecipeError(
            f"{where} has {len(documents)} documents, and {several}; a file makes one result, so "
            "let exactly one be merged by none."
        )
    stages: dict[str, Recipe] = {}
    made: set[int] = set()
    while len(made) < len(documents):
        ready = [i for i in users if i not in made and users[i] <= made]
        if not ready:
            raise RecipeError(f"{where}: documents merge each other's results; mend their names.")
        for index in ready:
            recipe = recipe_from_mergekit(
                documents[index],
                where=f"{where}, document {index + 1}",
                base_dir=base_dir,
                stages=stages,
            )
            made.add(index)
            if index == last[0]:
                return recipe
            stages |= dict.fromkeys(names[index], recipe)
    raise AssertionError(where)


def _models(
    document: Mapping[str, Any], where: str, base_dir: Path, owners: Mapping[str, int]
) -> list[str]:
    config = read_config(document, where=where, base_dir=base_dir, stages=owners)
    sources = [source.model for piece in config.slices for source in piece.sources]
    return [*sources, *([config.base_model] if config.base_model is not None else [])]
