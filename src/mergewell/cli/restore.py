"""The command `restore`: arguments, and what it does and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergewell.cli.explain import Json, print_json


def restore(
    folder: Annotated[Path, typer.Argument(help="A folder of `merge --companion`.")],
    expert: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which expert to give back.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder to write.")] = None,
    companion: Annotated[
        Path | None, typer.Option(metavar="FILE", help="That in the folder if absent.")
    ] = None,
    json: Json = False,
) -> None:
    """Give an expert back from a merged model and its companion."""
    from mergewell.errors import OutputError, RecipeError
    from mergewell.restore import restore_expert

    if expert is None:
        raise RecipeError("No expert is named; add --expert NAME.")
    if out is None:
        raise OutputError("No output folder is named; add --out DIR.")
    manifest = restore_expert(folder, expert, out, companion=companion)
    if json:
        print_json(manifest.model_dump(mode="json"))
        return
    print(
        f"{out}: {expert}, {manifest.tensors_changed} of {manifest.tensors} tensors given back in "
        f"{manifest.seconds:.1f} s."
    )
