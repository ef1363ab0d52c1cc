"""The command line: arguments and help. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mergewell.cli.advise import advise
from mergewell.cli.align import align
from mergewell.cli.doctor import doctor
from mergewell.cli.evaluate import evaluate
from mergewell.cli.explain import explain, repair
from mergewell.cli.extract import extract
from mergewell.cli.init import init
from mergewell.cli.learn import learn
from mergewell.cli.partners import partners
from mergewell.cli.restore import restore
from mergewell.cli.schema import schema
from mergewell.cli.tune import tune

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Will these models merge? How should they be merged? What came out? Can I trust the file?",
)

Base = Annotated[str | None, typer.Option(metavar="PATH", help="The model all experts came from.")]
Experts = Annotated[
    list[str] | None,
    typer.Option("--expert", metavar="PATH[:C]", help="An expert and its coefficient; repeat."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe, or the manifest.json of a merge.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Worker threads; one a core if absent.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="A parameter of the method.")
]

Data = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Unlabelled inputs: .jsonl, folder, .safetensors, .npz."),
]
Mode = Annotated[
    str, typer.Option(help="Whose inputs a layer gets: merged, pretrained, mean or own.")
]
Samples = Annotated[int, typer.Option(min=1, help="At most this many inputs.")]
Factory = Annotated[
    str | None,
    typer.Option(metavar="PKG:FUNC", help="Function that makes the module, or timm:NAME."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from mergewell import __version__

        print(f"mergewell {__version__}")
        raise typer.Exit


def _set_progress(style: str | None) -> None:
    if style is not None:
        from mergewell.cli.progress import set_style

        set_style(style)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
    progress: Annotated[
        str | None,
        typer.Option(callback=_set_progress, help="auto, plain, json (events) or none."),
    ] = None,
) -> None:
    del version, progress


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to put the results.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="MiniLM and text tasks.")] = False,
    json: Json = False,
) -> None:
    """Check, merge and evaluate real experts, offline; write a report."""
    from mergewell.cli import commands

    commands.demo(out, text=text, as_json=json)


@app.command()
def check(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; or use the flags.")] = None,
    base: Base = None,
    expert: Experts = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Unlabelled inputs: .jsonl, folder, .safetensors, .npz; once, or once an expert, "
            "of its task: then what merges keep is predicted from them.",
        ),
    ] = None,
    mode: Mode = "merged",
    samples: Samples = 128,
    model_factory: Factory = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of `calibrate`, in place of --data.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="A name from `mergewell methods`; average if absent.")
    ] = None,
    set_: Settings = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also decompose matrices: minutes on large models.")
    ] = False,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write JSON to a file; - is standard output.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page.")] = None,
) -> None:
    """Say whether what a recipe or flags name will merge (with M-Loss, given --data)."""
    from mergewell.cli import commands

    commands.check(
        recipe, base=base, experts=expert or [], data=data or [], calibration=calibration,
        mode=mode, samples=samples, model_factory=model_factory, method=method, settings=set_ or [],
        deep=deep, json_file=json, html_file=html,
    )  # fmt: skip


@app.command()
def plan(recipe: RecipeFile, json: Json = False, workers: Workers = None) -> None:
    """Show what every tensor will get, costs and warnings."""
    from mergewell.cli import merge as commands

    commands.plan(recipe, as_json=json, workers=workers)


@app.command()
def merge(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe or a merge's manifest.json; or use the flags.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder to write.")] = None,
    base: Base = None,
    expert: Experts = None,
    method: Annotated[
        str | None, typer.Option(help="A name from `mergewell methods`; average if absent.")
    ] = None,
    set_: Settings = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random methods; 0 if absent.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Stored dtype; the base's if absent.")] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help="What `calibrate` made, for such methods.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a broken-off run.")] = False,
    workers: Workers = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Write files I, I+N, ...; the last commits.")
    ] = None,
    engine: Annotated[str, typer.Option(help="Where to work: threads or ray.")] = "threads",
    device: Annotated[
        str, typer.Option(help="What to compute on: cpu, cuda or cuda:1; cuda rounds its own way.")
    ] = "cpu",
    hash_: Annotated[
        str, typer.Option("--hash", help="Of inputs and outputs: xxh3-128 or sha256.")
    ] = "xxh3-128",
    companion: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:K=V]",
            help="What gives experts back, in DIR: masks (emr, tall_masks) or low-rank experts "
            "that inputs are routed to (smile, mass).",
        ),
    ] = None,
    card: Annotated[
        bool,
        typer.Option("--card", help="Write a model card, README.md: recipe, licences, citations."),
    ] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the recipe as YAML and stop.")
    ] = False,
    json: Json = False,
) -> None:
    """Merge by a recipe or by flags; complete or not at all."""
    from mergewell.cli import merge as commands

    commands.merge(
        recipe, out, base=base, experts=expert or [], method=method, settings=set_ or [],
        seed=seed, dtype=dtype, calibration=calibration, resume=resume, workers=workers,
        shard=shard, engine=engine, device=device, hash_kind=hash_, companion=companion,
        card=card, print_recipe=print_recipe, as_json=json,
    )  # fmt: skip


@app.command()
def calibrate(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; or use the flags.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The file to write.")] = None,
    base: Base = None,
    expert: Experts = None,
    method: Annotated[
        str | None, typer.Option(help="A name from `mergewell methods`; average if absent.")
    ] = None,
    set_: Settings = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Inputs; once, or once an expert, each of its task."),
    ] = None,
    samples: Samples = 128,
    mode: Mode = "merged",
    model_factory: Factory = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Run batches I, I+N, ... only; see `join`.")
    ] = None,
    gram: Annotated[
        bool, typer.Option("--gram", help="Gather Gram matrices of linear maps too; large.")
    ] = False,
    fisher: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Squared gradients too; outputs are classes, features."),
    ] = None,
    json: Json = False,
) -> None:
    """Run models block by block on a few inputs and keep what was seen."""
    from mergewell.cli import calibrate as commands

    commands.calibrate(
        recipe, out, base=base, experts=expert or [], method=method, settings=set_ or [],
        data=data or [], samples=samples, mode=mode, model_factory=model_factory, shard=shard,
        gram=gram, fisher=fisher, as_json=json,
    )  # fmt: skip


@app.command()
def join(
    calibrations: Annotated[list[Path], typer.Argument(help="Files of `calibrate --shard`.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The file to write.")] = None,
    json: Json = False,
) -> None:
    """Join calibrations of shards of one data set."""
    from mergewell.cli import calibrate as commands

    commands.join(calibrations, out, as_json=json)


@app.command()
def report(
    folder: Path,
    other: Annotated[Path | None, typer.Argument(help="Compare with this one.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where a comparison goes: compare.html.")
    ] = None,
) -> None:
    """Make the page of a results folder again, or compare two merges or two checks."""
    from mergewell.cli import commands

    commands.report(folder, other, out=out)


@app.command()
def verify(
    folder: Path,
    deep: Annotated[
        bool, typer.Option("--deep", help="Check the inputs too and make some tensors again.")
    ] = False,
    json: Json = False,
) -> None:
    """Check a merged folder against its manifest."""
    from mergewell.cli import commands

    commands.verify(folder, deep=deep, as_json=json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, for its manual page.")] = None,
    json: Json = False,
) -> None:
    """List the merge methods, or show one's manual page."""
    from mergewell.cli import commands

    commands.methods(name, as_json=json)


_INTERRUPTED = 130
_STOPPED = (
    "stopped; an output stands complete under its name or not at all, and a merge of several files "
    "goes on with --resume."
)


app.command()(explain)
app.command()(repair)
app.command()(restore)
app.command()(learn)
app.command()(tune)
app.command()(partners)
app.command()(extract)
app.command()(align)
app.command()(advise)
app.command()(doctor)
app.command()(evaluate)
app.command()(init)
app.command()(schema)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 2 the user's mistake, 1 ours."""
    try:
        given = sys.argv[1:] if arguments is None else arguments
        result = app(given or ["--help"], prog_name="mergewell", standalone_mode=False)
    except KeyboardInterrupt:
        result = _INTERRUPTED
    except Exception as error:
        return _explain(error)
    if result == _INTERRUPTED:
        print(f"mergewell: {_STOPPED}", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _explain(error: Exception) -> int:
    """Print an error for people and return the exit code."""
    if hasattr(error, "format_message"):  # the command line itself was wrong
        sentence = str(error.format_message()).rstrip(".").replace("\n", " ")  # pyright: ignore
        print(f"mergewell: {sentence}; see `mergewell --help`.", file=sys.stderr)
        return 2
    from mergewell.errors import MergewellError, UserError

    if not isinstance(error, MergewellError):
        raise error
    print(f"mergewell: {error}", file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1


def run() -> None:
    """Enter from the console script."""
    sys.exit(main())
