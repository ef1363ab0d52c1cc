"""The reference, written from the code: methods, commands, learners, diagnostics, recipe.

`conf.py` calls `write_reference`; nothing that it writes is kept in the repository.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from typer.main import get_command

from mergewell.cli.commands import describe_method
from mergewell.cli.main import app
from mergewell.cli.main import main as run_command
from mergewell.cli.schema import recipe_schema
from mergewell.companions.base import COMPANIONS
from mergewell.component import Family
from mergewell.diagnostics.base import DIAGNOSTICS
from mergewell.learners.base import LEARNERS
from mergewell.methods.base import METHODS
from mergewell.recipe import Recipe

QUALITY = Path(__file__).parent / "benchmarks" / "quality.json"
LAWS = {
    "order_free": "The result changes with the order of the experts",
    "base_if_unmoved": "Experts equal to the base do not give the base",
    "single_expert": "One expert does not give itself",
    "equal_experts": "Equal experts do not give themselves",
}
GRANULARITY = {"row": "whole rows", "matrix": "whole matrices", "tensor": "whole tensors"}
NOT_MEASURED = "not measured"


def write_reference(folder: Path) -> None:
    """Write all pages anew."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "methods").mkdir(parents=True)
    measured = Measured(json.loads(QUALITY.read_text())["benchmarks"])
    for name in METHODS.names():
        (folder / "methods" / f"{name}.md").write_text(method_page(name, measured))
    for name, text in (
        ("methods", method_index(measured)),
        ("commands", command_page()),
        ("learners", family_page("Learners", LEARNERS, "`mergewell learn NAME`")),
        ("companions", family_page("Companions", COMPANIONS, "`merge --companion NAME`")),
        ("diagnostics", family_page("Diagnostics", DIAGNOSTICS, "`mergewell check`")),
        ("recipe", recipe_page(folder)),
    ):
        (folder / f"{name}.md").write_text(text)


class Measured:
    """What the quality benchmarks found of each method."""

    def __init__(self, benchmarks: Sequence[dict[str, Any]]) -> None:
        self.all = benchmarks

    def titles(self) -> list[str]:
        """Return what the benchmarks are called."""
        return [one["title"] for one in self.all]

    def of(self, name: str) -> list[dict[str, Any] | None]:
        """Return a method's row of each benchmark, or None where it did not run."""
        return [
            next((row for row in one["methods"] if row["name"] == name), None) for one in self.all
        ]


def method_page(name: str, measured: Measured) -> str:
    """Return the page of one method."""
    cls, facts = METHODS.get(name), describe_method(name)
    lines = [f"# {name}", "", *paragraphs(inspect.cleandoc(cls.__doc__ or "")), ""]
    if cls.paper.startswith("arXiv:"):
        lines += [f"[{cls.paper}](https://arxiv.org/abs/{cls.paper.removeprefix('arXiv:')})", ""]
    lines += ["## What it needs", "", f"{needs(facts['needs']).capitalize()}.", ""]
    if facts["parameters"]:
        lines += ["## Parameters", "", "| parameter | type | default | |", "|---|---|---|---|"]
        for each in facts["parameters"]:
            words = escaped(" ".join((each["help"] or "").split()))
            kind = escaped(each["type"])
            lines.append(f"| `{each['name']}` | {kind} | `{each['default']}` | {words} |")
        lines.append("")
    lines += ["## Measured", "", *results(name, measured), ""]
    broken = [f"- {LAWS[law]}: {escaped(text)}" for law in LAWS if (text := getattr(cls.laws, law))]
    if broken:
        lines += ["## Laws that do not hold", "", *broken, ""]
    return "\n".join(lines)


def results(name: str, measured: Measured) -> Iterable[str]:
    """Yield the table of a method's results."""
    rows = measured.of(name)
    if not any(rows):
        yield "Not measured on real experts yet (see [the benchmark](/benchmarks/quality.md))."
        return
    yield "| benchmark | mean over tasks [95 %] | over tuned task arithmetic | worst task | seeds |"
    yield "|---|---|---|---|---|"
    for one, row in zip(measured.all, rows, strict=True):
        if row is None:
            yield f"| {one['title']} | {NOT_MEASURED} | | | |"
            continue
        over = row["over"].get("task_arithmetic")
        gain = f"{over[0]:+.1f} [{over[1]:+.1f}, {over[2]:+.1f}]" if over else ""
        yield (
            f"| {one['title']} | {row['mean']:.1f} [{row['low']:.1f}, {row['high']:.1f}] | {gain} "
            f"| {row['worst']:.1f} ({row['worst_task']}) | {row['seeds']} |"
        )
    yield ""
    ends = "; ".join(
        f"{one['title']}: base {one['base']:.1f}, ensemble {one['ensemble']:.1f}, own experts "
        f"{one['experts']:.1f}"
        for one in measured.all
    )
    yield f"{ends}. How: [quality](/benchmarks/quality.md)."


def method_index(measured: Measured) -> str:
    """Return the list of all methods with both results."""
    titles = measured.titles()
    lines = [
        "# Methods", "",
        f"{len(METHODS.names())} methods. Figures: mean over tasks on real experts, tuned on equal "
        "budgets with labels; [how](/benchmarks/quality.md).", "",
        f"| method | | needs | {' | '.join(titles)} |", f"|---|---|---|{'---|' * len(titles)}",
    ]  # fmt: skip
    for name in METHODS.names():
        cells = ["" if row is None else f"{row['mean']:.1f}" for row in measured.of(name)]
        facts = describe_method(name)
        lines.append(
            f"| [{name}](methods/{name}.md) | {escaped(facts['summary'])} | {needs(facts['needs'])} "
            f"| {' | '.join(cells)} |"
        )
    tree = ["", "```{toctree}", ":hidden:", ":glob:", "", "methods/*", "```", ""]
    return "\n".join([*lines, *tree])


def needs(facts: dict[str, Any]) -> str:
    """Return in words what a method needs."""
    found = ["a base" if facts["base"] else "no base"]
    if facts["experts"]:
        found.append(f"{facts['experts']} experts")
    found += [GRANULARITY[facts["granularity"]]] if facts["granularity"] in GRANULARITY else []
    return ", ".join(found)


def command_page() -> str:
    """Return the page of all commands: what `--help` shows."""
    os.environ["COLUMNS"] = "100"  # help is wrapped to the terminal
    lines = ["# Commands", "", "What `mergewell COMMAND --help` shows.", ""]
    for command in get_command(app).commands:  # type: ignore[attr-defined] - a group of commands
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            run_command([command, "--help"])
        body = "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())
        lines += [f"## {command}", "", "```text", body, "```", ""]
    return "\n".join(lines)


def family_page(title: str, family: Family[Any], how: str) -> str:
    """Return the page of a family of components, called by `how`."""
    lines = [f"# {title}", "", f"Used by {how}.", ""]
    for name in family.names():
        cls = family.get(name)
        lines += [f"## {name}", "", *paragraphs(inspect.cleandoc(cls.__doc__ or "")), ""]
        defaults = cls.model_construct().parameters()
        rows = [
            f"| `{field}` | `{defaults.get(field)}` | "
            f"{escaped(' '.join((info.description or '').split()))} |"
            for field, info in cls.model_fields.items()
        ]
        if rows:
            lines += ["| parameter | default | |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


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


def paragraphs(text: str) -> Iterable[str]:
    """Yield a docstring as Markdown: formulas as they stand, what is a list of facts as one."""
    for block in text.split("\n\n"):
        whole = re.sub(r"\n(?=[A-Z][a-z]+: )", "\n\n", block)
        for part in whole.split("\n\n"):
            if label := re.match(r"(Papers?|Departures|Source|Raises|Shapes): ?", part):
                rest = " ".join(part[label.end() :].split())
                yield f"**{label[1]}.** {escaped(rest[:1].upper() + rest[1:])}"
            elif " = " in part or "\n  " in part:
                yield f"```text\n{part}\n```"
            else:
                yield escaped(" ".join(part.split()))
            yield ""


def escaped(text: str) -> str:
    """Return plain text that Markdown shows as it is; `names` in backquotes stay code."""
    pieces = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(
        piece if piece.startswith("`") else re.sub(r"([\\*_<>\[\]{}#~$])(?<!\\\|)", r"\\\1", piece)
        for piece in pieces
    ).replace("\\\\|", "\\|")
