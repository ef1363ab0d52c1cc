"""The reference, written from the code: methods, commands, learners, diagnostics, recipe.

`conf.py` calls `write_reference`; nothing that it writes is kept in the repository.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from typer.main import get_command
from typeset import escaped, paragraphs

from mergewell.cli.commands import describe_method
from mergewell.cli.main import app
from mergewell.cli.main import main as run_command
from mergewell.cli.schema import recipe_schema
from mergewell.companions.base import COMPANIONS
from mergewell.component import Family
from mergewell.diagnostics.base import DIAGNOSTICS
from mergewell.gram import GramMerge
from mergewell.kernels.base import has_form
from mergewell.learners.base import LEARNERS
from mergewell.low_rank import LowRankMerge
from mergewell.matrices import MatrixMerge
from mergewell.methods.base import METHODS, MergeMethod
from mergewell.recipe import Recipe

QUALITY = Path(__file__).parent / "benchmarks" / "quality.json"
LAWS = {
    "order_free": "The result changes with the order of the experts",
    "base_if_unmoved": "Experts equal to the base do not give the base",
    "single_expert": "One expert does not give itself",
    "equal_experts": "Equal experts do not give themselves",
}
GRANULARITY = {"element": "blocks of any size", "row": "whole rows", "matrix": "whole matrices"}
CALIBRATION = {
    "gram": "a calibration made with `--gram`",
    "gram_forward": "a calibration made for it",
    "fisher": "a calibration made with `--fisher`",
    "m_loss": "a calibration",
}
UNITS = {"perplexity": " (perplexity, lower is better; gains in % lower)"}
NOT_MEASURED = "not\N{NO-BREAK SPACE}measured"


def write_reference(folder: Path) -> None:
    """Write all pages anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("methods", "commands"):
        (folder / part).mkdir(parents=True)
    measured = Measured(json.loads(QUALITY.read_text())["benchmarks"])
    for name in METHODS.names():
        (folder / "methods" / f"{name}.md").write_text(method_page(name, measured))
    for name, command in commands().items():
        (folder / "commands" / f"{name}.md").write_text(command_page(name, command))
    for name, text in (
        ("methods", method_index(measured)),
        ("commands", command_index()),
        ("learners", family_page("Learners", LEARNERS, "`mergewell learn NAME`", measured)),
        ("companions", family_page("Companions", COMPANIONS, "`merge --companion NAME`")),
        ("diagnostics", family_page("Diagnostics", DIAGNOSTICS, "`mergewell check`")),
        ("recipe", recipe_page(folder)),
    ):
        (folder / f"{name}.md").write_text(text)


class Measured:
    """What the quality benchmarks found of each method."""

    def __init__(self, benchmarks: Sequence[dict[str, Any]]) -> None:
        self.all = [
            {**one, "title": f"{one['title']}{UNITS.get(one.get('metric', ''), '')}"}
            for one in benchmarks
        ]

    def titles(self) -> list[str]:
        """Return what the benchmarks are called."""
        return [one["title"] for one in self.all]

    def of(self, name: str) -> list[dict[str, Any] | None]:
        """Return a method's row of each benchmark, or None where it did not run."""
        return [
            next((row for row in one["methods"] if row["name"] == name), None) for one in self.all
        ]


def gains() -> dict[str, dict[str, dict[str, str]]]:
    """Return measured gains in points, by benchmark, method and what is beaten, for the guides."""
    return {
        one["name"]: {
            row["name"]: {over: interval(*gain, sign="+") for over, gain in row["over"].items()}
            for row in one["methods"]
        }
        for one in json.loads(QUALITY.read_text())["benchmarks"]
    }


def method_page(name: str, measured: Measured) -> str:
    """Return the page of one method."""
    cls, facts = METHODS.get(name), describe_method(name)
    lines = [f"# {name}", "", *paragraphs(inspect.cleandoc(cls.__doc__ or ""))]
    if cls.paper.startswith("arXiv:"):
        lines += [f"[{cls.paper}](https://arxiv.org/abs/{cls.paper.removeprefix('arXiv:')})", ""]
    lines += ["## Measured", "", *results(name, measured), ""]
    lines += ["## How it runs", "", *(f"- {fact}" for fact in how_it_runs(cls)), ""]
    if facts["parameters"]:
        lines += ["## Parameters", "", "| parameter | type | default | |", "|---|---|---|---|"]
        for each in facts["parameters"]:
            words = escaped(" ".join((each["help"] or "").split()))
            kind = escaped(each["type"])
            lines.append(f"| `{each['name']}` | {kind} | `{each['default']}` | {words} |")
        lines.append("")
    if cls.search:
        lines += ["`mergewell tune` tries by default:", ""]
        lines += [f"- `{key}`: {', '.join(map(str, tried))}" for key, tried in cls.search.items()]
        lines.append("")
    broken = [f"- {LAWS[law]}: {escaped(text)}" for law in LAWS if (text := getattr(cls.laws, law))]
    if broken:
        lines += ["## Laws that do not hold", "", *broken, ""]
    return "\n".join(lines)


def how_it_runs(cls: type[MergeMethod]) -> Iterable[str]:
    """Yield what a method asks of a run: models, data, pieces, passes, a compiled form."""
    needs = cls.needs
    models = f", {counted(needs.experts)}" if needs.experts else ""
    yield f"Needs {'the base' if needs.base else 'no base'}{models}."
    if needs.calibration:
        yield f"Needs data: {' and '.join(CALIBRATION[each] for each in needs.calibration)}."
    else:
        yield "Needs no data: weights alone."
    yield f"Streams in {GRANULARITY[needs.granularity]}."
    method = cls()
    for statistic in method.statistics():
        passes = "one pass" if statistic.passes == 1 else f"{statistic.passes} passes"
        yield f"Looks at the weights beforehand, in {passes}, for `{statistic.component_name()}`."
    if has_form(method):
        yield "Has a compiled form, bit for bit the same."


def counted(experts: int) -> str:
    """Return a number of experts in words."""
    return "one expert" if experts == 1 else f"exactly {experts} experts"


def family_of(cls: type[MergeMethod]) -> str:
    """Return what a method works on: what a reader chooses by."""
    if issubclass(cls, GramMerge) or set(cls.needs.calibration) - {"m_loss"}:
        return "inputs"
    if issubclass(cls, LowRankMerge):
        return "adapters"
    return "matrices" if issubclass(cls, MatrixMerge) else "entries"


def results(name: str, measured: Measured) -> Iterable[str]:
    """Yield the table of a method's results."""
    rows = measured.of(name)
    if not any(rows):
        yield "Not measured on real experts: it has been run on none of the"
        yield "[benchmarks](/benchmarks/quality.md) yet."
        return
    yield "| benchmark | mean over tasks [95 %] | over tuned task arithmetic | worst task | seeds |"
    yield "|---|---|---|---|---|"
    for one, row in zip(measured.all, rows, strict=True):
        if row is None:
            yield f"| {one['title']} | {NOT_MEASURED} | – | – | – |"
            continue
        over = row["over"].get("task_arithmetic")
        gain = interval(*over, sign="+") if over else "–"
        gain = "itself" if name == "task_arithmetic" else gain
        yield (
            f"| {one['title']} | {with_interval(row)} | {gain} "
            f"| {row['worst']:.1f} ({row['worst_task']}) | {row['seeds']} |"
        )
    yield ""
    yield "Accuracy in % unless said otherwise, tuned with labels. For comparison:"
    yield ""
    for one in measured.all:
        yield (
            f"- {one['title']}: base {one['base']:.1f}, ensemble {one['ensemble']:.1f}, own "
            f"experts {one['experts']:.1f}"
        )
    yield ""
    yield "How it was done: [quality](/benchmarks/quality.md)."


def method_index(measured: Measured) -> str:
    """Return the list of all methods with all results, those measured first by themselves."""
    titles, names = measured.titles(), METHODS.names()
    ran = [name for name in names if any(measured.of(name))]
    ran.sort(key=lambda name: [-row["mean"] if row else 0.0 for row in measured.of(name)])
    bounds = "; ".join(
        f"{one['title']}: ensemble {one['ensemble']:.1f}, own experts {one['experts']:.1f}"
        for one in measured.all
    )
    lines = [
        "# Methods", "",
        f"{len(names)} methods. A method works on **entries**, on **matrices** (their directions), "
        "on **adapters** (matrices of low rank), or on **inputs** (it solves for the weights from "
        "what a calibration saw). [Learners](learners.md) find a recipe by descent instead.", "",
        f"## The {len(ran)} measured so far", "",
        "Mean over tasks on real experts, accuracy in % unless said otherwise, tuned on equal "
        "budgets with labels, with 95 % intervals over test examples "
        f"([how](/benchmarks/quality.md)). {bounds}.", "",
        f"| method | works on | data | {' | '.join(titles)} |",
        f"|---|---|---|{'---|' * len(titles)}",
        *(f"{row_of(name)} {' | '.join(map(with_interval, measured.of(name)))} |" for name in ran),
        "", "## All", "",
        f"| method | works on | data | {' | '.join(titles)} | what it does |",
        f"|---|---|---|{'---|' * len(titles)}---|",
        *(
            f"{row_of(name)} {' | '.join(map(mean_alone, measured.of(name)))} "
            f"| {escaped(METHODS.get(name).summary())} |"
            for name in names
        ),
    ]  # fmt: skip
    tree = ["", "```{toctree}", ":hidden:", ":glob:", "", "methods/*", "```", ""]
    return "\n".join([*lines, *tree])


def row_of(name: str) -> str:
    """Return how a method's row begins."""
    cls = METHODS.get(name)
    return f"| [{name}](methods/{name}.md) | {family_of(cls)} | {data_of(cls)} |"


def data_of(cls: type[MergeMethod]) -> str:
    """Return in a word what a method needs beside weights."""
    return "inputs" if cls.needs.calibration else "none"


def with_interval(row: dict[str, Any] | None) -> str:
    """Return a mean with its interval, in one line."""
    return interval(row["mean"], row["low"], row["high"]) if row else NOT_MEASURED


def interval(middle: float, low: float, high: float, sign: str = "") -> str:
    """Return a number with its interval, in one line."""
    form = f"{sign}.1f"
    text = f"{middle:{form}} [{low:{form}}, {high:{form}}]"
    return text.replace(" ", "\N{NO-BREAK SPACE}").replace("-", "−")


def mean_alone(row: dict[str, Any] | None) -> str:
    """Return a mean."""
    return f"{row['mean']:.1f}" if row else NOT_MEASURED


def commands() -> dict[str, Any]:
    """Return all commands by name, in the order of `--help`."""
    return get_command(app).commands  # type: ignore[attr-defined] - a group of commands


def command_page(name: str, command: Any) -> str:
    """Return the page of one command: what `--help` shows."""
    os.environ["COLUMNS"] = "100"  # help is wrapped to the terminal
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        run_command([name, "--help"])
    body = "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())
    words = escaped(" ".join((command.help or "").split()))
    return f"# {name}\n\n{words}\n\n```text\n{body}\n```\n"


def command_index() -> str:
    """Return the list of all commands."""
    lines = [
        "# Commands", "",
        "Data go to standard output, everything else to standard error. Exit code 0: done; 2: the "
        "user's mistake, in one sentence that says where and what to do; 1: ours.", "",
        "| command | |", "|---|---|",
    ]  # fmt: skip
    for name, command in commands().items():
        words = " ".join((command.help or "").split("\n\n")[0].split())
        lines.append(f"| [{name}](commands/{name}.md) | {escaped(words)} |")
    tree = ["", "```{toctree}", ":hidden:", ":glob:", "", "commands/*", "```", ""]
    return "\n".join([*lines, *tree])


def family_page(title: str, family: Family[Any], how: str, measured: Measured | None = None) -> str:
    """Return the page of a family of components, called by `how`."""
    lines = [f"# {title}", "", f"Used by {how}.", ""]
    for name in family.names():
        cls = family.get(name)
        lines += [f"## {name}", "", *paragraphs(inspect.cleandoc(cls.__doc__ or "")), ""]
        if measured is not None:
            lines += [f"**Measured.** {in_a_line(name, measured)}.", ""]
        defaults = cls.model_construct().parameters()
        rows = [
            f"| `{field}` | `{defaults.get(field)}` | "
            f"{escaped(' '.join((info.description or '').split()))} |"
            for field, info in cls.model_fields.items()
        ]
        if rows:
            lines += ["| parameter | default | |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def in_a_line(name: str, measured: Measured) -> str:
    """Return both results of a learner in a line."""
    pairs = zip(measured.titles(), measured.of(name), strict=True)
    return "; ".join(f"{title}: {with_interval(row)}" for title, row in pairs)


def recipe_page(folder: Path) -> str:
    """Return the page of the recipe's keys; the schema lies beside it."""
    (folder / "recipe.schema.json").write_text(json.dumps(recipe_schema(), indent=1))
    whole = Recipe.model_json_schema()  # a recipe may hold recipes, so that it is a definition
    schema = whole["$defs"]["Recipe"] if "$ref" in whole else whole
    lines = [
        "# Recipe", "",
        "The keys of a recipe in YAML; [the JSON schema](recipe.schema.json) is what "
        "`mergewell schema` prints, for editors.", "", "| key | default | |", "|---|---|---|",
    ]  # fmt: skip
    for key, facts in schema["properties"].items():
        words = escaped(" ".join(facts.get("description", "").split()))
        default = "needed" if key in schema.get("required", ()) else f"`{facts.get('default')}`"
        lines.append(f"| `{key}` | {default} | {words} |")
    return "\n".join([*lines, ""])
