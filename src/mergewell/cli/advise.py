"""The command `advise`: arguments, and what it does and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergewell.cli.explain import Base, Experts, Factory, opened, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergewell.advise.advice import Advice
    from mergewell.advise.bound import Evidence
    from mergewell.advise.early import EarlyChoice
    from mergewell.cli.progress import Steps


def advise(
    base: Base = None,
    expert: Experts = None,
    settings: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="How experts were or will be trained, YAML or JSON."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Inputs, labelled or not, of models that give logits; once, or once an expert.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Inputs of each path of data.")] = 64,
    model_factory: Factory = None,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write JSON to a file; - is standard output.")
    ] = None,
) -> None:
    """Advise on fine-tuning experts that shall merge, from settings, checkpoints and data."""
    from mergewell.advise.advice import advise as advise_on
    from mergewell.cli.progress import steps
    from mergewell.engines.base import one_thread_a_worker
    from mergewell.errors import DataError, OutputError, RecipeError

    if json is not None and json != "-" and Path(json).exists():  # before the work, not after it
        raise OutputError(f"{json} exists already and nothing is overwritten; choose another name.")
    if expert:
        if base is None:
            raise RecipeError("Advice compares experts with their base; name it with --base.")
        with steps() as shown, one_thread_a_worker():
            evidence, early = _of_checkpoints(
                base, expert, settings, data or [], samples, model_factory, shown
            )
    elif settings is None:
        raise RecipeError(
            "Nothing is named to advise on; add --base and --expert, or --settings FILE for "
            "experts that are not trained yet."
        )
    elif data or base is not None:
        raise DataError("Data and a base need experts; add --expert, or drop --data and --base.")
    else:
        evidence, early = _of_settings(settings), ()
    found = advise_on(evidence, early)
    if json == "-":
        print_json(found.as_data())
        return
    if json is not None:
        from json import dumps

        from mergewell.report.files import write_text

        write_text(Path(json), dumps(found.as_data(), indent=2, allow_nan=False))
    _print(found)


def _of_settings(settings: Path) -> Evidence:
    """Return what settings alone say of experts that need not be there.

    Raises:
        DataError: as `known_of`, or the file lists no expert.
    """
    from mergewell.advise.bound import Evidence
    from mergewell.advise.settings import SettingsFile, known_of, read_settings
    from mergewell.errors import DataError

    known = known_of((), (), settings)
    if not known:
        raise DataError(f"{settings} lists no expert; write one or more under `experts`.")
    given: SettingsFile = read_settings(settings)
    named = isinstance(given.experts, dict)
    names = list(given.experts) if named else [f"expert {i}" for i in range(1, len(known) + 1)]
    return Evidence([str(name) for name in names], known)


def _of_checkpoints(
    base: str,
    experts: Sequence[str],
    settings: Path | None,
    data: Sequence[str],
    samples: int,
    model_factory: str | None,
    shown: Steps,
) -> tuple[Evidence, Sequence[EarlyChoice]]:
    """Return what weights, and data if given, say of experts, and of their earlier checkpoints.

    Raises:
        RecipeError: an expert with a coefficient.
        UserError: whatever is wrong with checkpoints, settings or data.
    """
    from mergewell.advise.examine import Inputs, examine
    from mergewell.advise.settings import known_of
    from mergewell.check import short_names
    from mergewell.errors import RecipeError
    from mergewell.flags import recipe_from_flags
    from mergewell.plan import make_plan

    recipe = recipe_from_flags(base=base, experts=experts, method="average", settings=[])
    for each in recipe.experts:
        if each.coefficient != 1.0:
            raise RecipeError(
                f"advise speaks of the experts' uniform average, but {each.path} has the "
                f"coefficient {each.coefficient:g}; drop it."
            )
    paths = [each.path for each in recipe.experts]
    names = short_names(paths)
    planned = make_plan(recipe)
    folders = [expert.path if expert.path.is_dir() else None for expert in planned.experts]
    known = known_of(names, folders, settings)
    if not data:
        return examine(planned, names, known, on_step=shown.update)
    from mergewell.cli.given import material_of

    planned, source = opened(base, experts, model_factory)
    material, _ = material_of(planned, source, data, samples * len(data))
    inputs = Inputs(material.tasks, source.build)
    return examine(planned, names, known, inputs=inputs, on_step=shown.update)


def _print(found: Advice) -> None:
    """Print the terms and the knobs as tables, then the advice."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from mergewell.advise.advice import LOOSE, WORDS
    from mergewell.report.numbers import number

    console = Console()
    console.print(Text(LOOSE), highlight=False)
    console.print()
    console.print(Text(f"The bound's terms, in {found.bound.unit}", style="bold"), highlight=False)
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    largest = found.bound.dominating
    for place, term in enumerate(found.bound.terms, start=1):
        value = "?" if term.value is None else number(term.value)
        mark = "  largest of what merging adds" if term is largest else ""
        said = Text(f"{term.what}{mark}").append(f"\n{term.source}", style="dim")
        table.add_row(f"{place}", value, said)
    console.print(Padding(table, (0, 0, 0, 2)), highlight=False)
    if found.knobs:
        console.print()
        console.print(Text("Knobs, turned in all experts", style="bold"), highlight=False)
        table = Table.grid(padding=(0, 2), pad_edge=False)
        for knob in found.knobs:
            percent = f"{knob.elasticity:+.2f} % for 1 % more"
            table.add_row(WORDS[knob.name], knob.direction, percent, f"atlas: {knob.verdict}")
        console.print(Padding(table, (0, 0, 0, 2)), highlight=False)
    console.print()
    for sentence in found.sentences:
        console.print(Text(sentence), highlight=False)
