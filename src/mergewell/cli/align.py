"""The command `align`: arguments, and what it does and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergewell.cli.explain import Factory, Json, print_json


def align(
    expert: Annotated[str, typer.Argument(help="The expert whose units are moved.")],
    to: Annotated[
        str | None, typer.Option(metavar="PATH", help="The base or expert to be like.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Unlabelled inputs; two are enough for weights."),
    ] = None,
    match: Annotated[
        str, typer.Option(help="What is compared: weights, or activations on the data.")
    ] = "weights",
    zip: Annotated[
        bool, typer.Option("--zip", help="Merge the two: join units, also of one model (ZipIt).")
    ] = False,
    model_factory: Factory = None,
    samples: Annotated[int, typer.Option(min=2, help="At most this many inputs.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the order in which groups are matched.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder to write.")] = None,
    json: Json = False,
) -> None:
    """Put an expert's units in another model's order, so that the two can be merged.

    For models that were trained from different initialisations. The function stays the same. With
    --zip what is written is the merged model, as if the average had been made, too.
    """
    from typing import cast, get_args

    from mergewell.alignment.align import Match, align_folder, zip_folder
    from mergewell.engines.base import one_thread_a_worker
    from mergewell.errors import DataError, ModelError, OutputError, RecipeError, did_you_mean
    from mergewell.models.loader import ModuleSource
    from mergewell.report.numbers import counted, fine_percent, number, percent

    if out is None:
        raise OutputError("No output folder is named; add --out DIR.")
    if to is None:
        raise RecipeError("Nothing is named to align the expert to; add --to PATH.")
    if match not in get_args(Match):
        raise RecipeError(f"--match {match}: {did_you_mean(match, get_args(Match))}")
    if match == "activations" and data is None:
        raise DataError("Activations are compared on inputs; add --data PATH.")
    if model_factory is None and not Path(expert).is_dir():
        raise ModelError(
            f"{expert} is no Hugging Face folder, so align needs --model-factory PKG:FUNC (or "
            "timm:NAME), which makes the module that takes these weights."
        )
    if zip:
        if data is None:
            raise DataError("Units are joined by what they do on inputs; add --data PATH.")
        if match != "weights":
            raise RecipeError(f"--zip compares activations in its own way; drop --match {match}.")
        with one_thread_a_worker():
            manifest = zip_folder(
                expert, to, out, source=ModuleSource.parse(model_factory or expert), data=data,
                samples=samples, seed=seed,
            )  # fmt: skip
        _print_zipped(manifest.model_dump(mode="json")["zipit"], out, as_json=json)
        return
    with one_thread_a_worker():
        manifest = align_folder(
            expert, to, out, source=ModuleSource.parse(model_factory or expert), data=data,
            samples=samples, match=cast("Match", match), seed=seed,
        )  # fmt: skip
    done = manifest.model_dump(mode="json")["align"]
    if json:
        print_json({"version": 1, "folder": str(out), **done})
        return
    reasons: dict[str, int] = {}
    for reason in done["fixed"].values():
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in reasons.items():
        print(f"kept in order: {counted(count, 'dimension')}: {reason}")
    for name in done["unseen"]:
        print(f"kept in order: {name}, since no module returns these units")
    before, after = done["distance_before"], done["distance_after"]
    nearer = 1 - after / before if before else 0.0
    print(
        f"{out}: {percent(done['moved'])} of {counted(done['units'], 'unit')} in "
        f"{counted(len(done['groups']), 'group')} moved; distance to {to} {number(before)} before, "
        f"{number(after)} after ({fine_percent(nearer)} nearer); outputs changed by "
        f"{number(done['output_change'], 2)} of their norm (rounding)."
    )


def _print_zipped(done: dict[str, Any], out: Path, *, as_json: bool) -> None:
    from mergewell.report.numbers import counted, percent

    if as_json:
        print_json({"version": 1, "folder": str(out), **done})
        return
    for name in done["across"]:
        print(f"joined across the models only: {name}")
    print(
        f"{out}: {counted(done['units'], 'unit')} in {counted(done['groups'], 'group')} joined in "
        f"pairs, {percent(done['within'])} of them within one model; this is the merged model, on "
        f"{counted(done['samples'], 'input')}."
    )
