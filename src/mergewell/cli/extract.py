"""The command `extract`: arguments, and what it does and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergewell.cli.explain import Json, print_json


def extract(
    expert: Annotated[str, typer.Argument(help="A merged folder, an expert or an adapter.")],
    base: Annotated[
        str | None, typer.Option(metavar="PATH", help="The model that it came from.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Directions of each matrix at most.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="E", help="Share of each change's squared norm to keep, such as 0.9."),
    ] = None,
    whole: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Tensors to keep as they are; repeat."),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Tensors to leave at the base's; repeat."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Stored dtype of the factors: float32, bfloat16 or float16.")
    ] = "float32",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder to write.")] = None,
    json: Json = False,
) -> None:
    """Write what a model adds to its base as a LoRA adapter, with its error.

    Merge with --dtype float32 what is to be extracted: 16 bits add rounding of full rank.
    """
    from typing import cast, get_args

    from mergewell.cli.progress import steps
    from mergewell.errors import OutputError, RecipeError, did_you_mean
    from mergewell.extract import FactorDtype, Size, extract_adapter
    from mergewell.report.numbers import counted, fine_percent

    if out is None:
        raise OutputError("No output folder is named; add --out DIR.")
    if base is None:
        raise RecipeError("An adapter is a change of a base; name it with --base PATH.")
    if dtype not in get_args(FactorDtype):
        raise RecipeError(f"--dtype {dtype}: {did_you_mean(dtype, get_args(FactorDtype))}")
    with steps() as shown:
        manifest = extract_adapter(
            base, expert, out, size=Size(rank, energy), whole=whole or [],
            leave_out=leave_out or [], dtype=cast("FactorDtype", dtype), on_step=shown.update,
        )  # fmt: skip
    done = manifest.model_dump(mode="json")["extract"]
    if json:
        print_json({"version": 1, "folder": str(out), **done})
        return
    width = max(len(name) for name in done["tensors"])
    for name, cut in done["tensors"].items():
        print(f"{name:<{width}}  rank {cut['rank']:>4}  error {fine_percent(cut['error'])}")
    for name in done["whole"]:
        print(f"{name:<{width}}  kept whole")
    for name in done["left_out"]:
        print(f"{name:<{width}}  left at the base's")
    print(
        f"\n{out}: {counted(len(done['tensors']), 'tensor')} factored, {len(done['whole'])} kept "
        f"whole, {len(done['left_out'])} left out; error of all together "
        f"{fine_percent(done['error'])} of the change's norm."
    )
