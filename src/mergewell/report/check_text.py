"""The check in a terminal: the page's content as text, with colour where the terminal has it.

Everything fits the console's width, 80 columns without a terminal. Levels are told by a word and a
mark beside their colour; marks and bars are ASCII where the encoding has no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mergewell.report import findings, svg
from mergewell.report.layer_figures import BARS, axis_end, drawn_bars
from mergewell.report.numbers import counted, fine_percent
from mergewell.report.place_figures import pooled
from mergewell.report.prediction import Prediction, outlook, prediction_of, span
from mergewell.report.results import WHOLES, Check, Finding, LayerMLoss, Level

STYLES: dict[Level, str] = {"good": "green", "fair": "yellow", "poor": "bold red"}

_MARKS: dict[Level, str] = {"good": "●", "fair": "▲", "poor": "■"}
_ASCII_MARKS: dict[Level, str] = {"good": "+", "fair": "~", "poor": "!"}
_STEPS = "▁▂▃▄▅▆▇█"
_ASCII_STEPS = "_.-=+*#@"
_ASCII = str.maketrans({"×": "x", "–": "-", "−": "-", "…": "~", "’": "'", "“": '"', "”": '"'})


def show_check(check: Check, console: Console) -> None:
    """Print a check: verdict, reasons, what to do next, M-Loss by layer, other predictors."""
    page = _Page(console)
    level = check.level or findings.worst_level(check)
    page.line(page.level(level), page.text(check.verdict, "bold"))
    expected = prediction_of(check)
    if expected is not None:
        page.expected(expected)
    decide = findings.deciding(check)
    if decide:
        page.head("Why")
        page.grid((page.level(one.level), page.answer(one), page.number(one), "") for one in decide)
    if check.findings:
        page.head("What to do next")
        steps = enumerate(findings.next_steps(check), start=1)
        page.grid((page.text(f"{index}."), page.text(step), "", "") for index, step in steps)
    units = [layer for layer in check.layers if layer.kind not in WHOLES]
    wholes = [layer for layer in check.layers if layer.kind in WHOLES]
    if units:
        page.head(f"M-Loss by layer (mode {check.mode}, {check.samples} inputs)")
        page.layers(units, check)
    if wholes:
        page.head("M-Loss of whole blocks and the output")
        page.layers(wholes, check)
    theory = findings.theory_sentence(findings.theory_layers(check.layers))
    if theory:
        page.head("Theory beside measurement")
        page.grid([(page.text(theory), "", "", "")])
    others = findings.compared(check)
    if others:
        page.head(f"Other predictors, {findings.COMPARED}")
        page.grid((page.level(o.level), page.answer(o), page.number(o), "") for o in others)
    page.trends(check)
    if check.unanswered:
        page.head("Not answered")
        rows = (
            (page.text(name), page.text(why, "dim"), "", "")
            for name, why in findings.left_open(check)
        )
        page.grid(rows)
    if check.uncovered:
        page.head(f"Not covered by M-Loss: {counted(len(check.uncovered), 'module')}, by reason")
        page.uncovered(check)


@dataclass(frozen=True, slots=True)
class _Page:
    console: Console

    @property
    def width(self) -> int:
        return self.console.width

    @property
    def unicode(self) -> bool:
        return _holds(_STEPS + "●▲■", self.console.encoding)

    def text(self, text: str, style: str = "") -> Text:
        """Return text that the terminal can show: nothing that it would obey or cannot encode."""
        clean = svg.clean(text).replace("\N{NO-BREAK SPACE}", " ")
        encoding = self.console.encoding
        if not _holds(clean, encoding):
            clean = clean.translate(_ASCII).encode(encoding, "replace").decode(encoding)
        return Text(clean, style=style)

    def level(self, level: Level) -> Text:
        mark = (_MARKS if self.unicode else _ASCII_MARKS)[level]
        return Text(f"{mark} {level}", style=STYLES[level], no_wrap=True)

    def answer(self, finding: Finding) -> Text:
        said = self.text(finding.verdict)
        return said.append(f"\n{self.text(finding.question)}", style="dim")

    def number(self, finding: Finding) -> Text:
        return self.text(findings.measure(finding)[0], "bold")

    def line(self, *parts: Text) -> None:
        self.console.print(Text("  ").join(parts), highlight=False)

    def head(self, text: str) -> None:
        self.console.print()
        self.console.print(self.text(text, "bold"), highlight=False)

    def grid(self, rows: Iterable[Sequence[Text | str]]) -> None:
        """Print rows whose widest column breaks its lines and whose numbers stand on the right."""
        held = [list(row) for row in rows]
        table = Table.grid(padding=(0, 2), pad_edge=False)
        used = [index for index in range(4) if any(str(row[index]) for row in held)]
        broad = max(used, key=lambda index: max(len(str(row[index])) for row in held))
        for index in used:
            right = index > broad
            if index == broad:
                table.add_column(overflow="fold", ratio=1 if index < used[-1] else None)
            else:
                table.add_column(justify="right" if right else "left", no_wrap=True)
        for row in held:
            table.add_row(*(row[index] for index in used))
        self.console.print(Padding(table, (0, 0, 0, 2)), highlight=False)

    def expected(self, prediction: Prediction) -> None:
        """Print what is expected of each merge."""
        found = outlook(prediction)
        self.head("What to expect")
        self.line(Text(" "), self.text(found.headline))
        for line in found.lines:
            self.console.print(Padding(self.text(line, "dim"), (0, 0, 0, 2)), highlight=False)
        if len(found.rows) > 1:
            self.grid(
                (self.text(one.name), self.text(span(one.mean)), "", "") for one in found.rows
            )

    def layers(self, layers: Sequence[LayerMLoss], check: Check) -> None:
        """Print M-Loss as bars that end with the data; of very many layers the worst."""
        drawn, end = drawn_bars(layers), axis_end(max(layer.relative for layer in layers))
        kinds = len({layer.kind for layer in drawn}) > 1
        rest = 2 + 9 + 8 + (12 if kinds else 0)
        name_room = max(min(max(len(a.layer) for a in drawn), (self.width - rest) * 2 // 3), 8)
        bar_room = max(min(self.width - rest - name_room - 1, 30), 0)
        for layer in drawn:
            level = check.cutoffs.level(layer.relative)
            line = Text("  ").append(
                f"{self.text(svg.short(layer.layer, name_room)).plain:<{name_room}}"
            )
            if kinds:
                line.append(f"  {layer.kind:<10}", style="dim")
            share = self.text(fine_percent(layer.relative)).plain
            line.append(f"{share:>9}  ").append_text(self.level(level))
            if bar_room > 1 and layer.relative > 0:
                length = max(round(bar_room * layer.relative / end), 1)
                line.append(" ").append(("█" if self.unicode else "#") * length, STYLES[level])
            line.no_wrap = True
            self.console.print(line, highlight=False, overflow="ellipsis")
        said = f"Bars end at {fine_percent(end)}"
        if end < check.cutoffs.fair:
            said += f"; below {fine_percent(check.cutoffs.fair)} a layer is good"
        if len(layers) > BARS:
            left = counted(len(layers) - len(drawn), "layer")
            said += f"; {left} with less M-Loss left out, which --html and --json show"
        self.console.print(Padding(self.text(f"{said}.", "dim"), (0, 0, 0, 2)), highlight=False)

    def trends(self, check: Check) -> None:
        """Print a small curve for each finding that has a value along the network."""
        held = [one for one in findings.places(check) if one.along]
        if not held:
            return
        self.head("Through the network, first to last, lowest to highest")
        room = min(24, max(self.width // 3, 4))
        rows: list[tuple[Text, Text, str, str]] = []
        for one in held:
            values = [point.value for point in pooled(one.values, room)]
            low, high = (findings.shown(end(values), one.finding.unit) for end in (min, max))
            said = self.text(f"{one.finding.question} {low} to {high}")
            rows.append((Text(self.curve(values), style="cyan"), said, "", ""))
        self.grid(rows)

    def curve(self, values: Sequence[float]) -> str:
        """Return one character a value, as high as it lies between the least and the largest."""
        steps = _STEPS if self.unicode else _ASCII_STEPS
        low, high = min(values), max(values)
        if math.isclose(low, high, rel_tol=1e-12):
            return steps[0] * len(values)
        return "".join(steps[round((len(steps) - 1) * (v - low) / (high - low))] for v in values)

    def uncovered(self, check: Check) -> None:
        reasons: dict[str, list[str]] = {}
        for name in check.uncovered:
            reason = check.uncovered_reasons.get(name, "no reason given")
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            said = self.text(f"{reason} ({len(names):,}): ")
            said.append(f"{self.text(', '.join(names))}", style="dim")
            self.console.print(Padding(said, (0, 0, 0, 2)), highlight=False, overflow="fold")


def _holds(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
