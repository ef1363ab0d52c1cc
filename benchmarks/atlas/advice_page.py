"""The page and the picture of the advice study, made from docs/studies/advice.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element

from mergewell.report.svg import add, written

WIDTH, LEFT, ROW, TOP = 860, 170, 18, 40
COLOURS = {"small_cnn": "#1f6fb4", "efficientnet": "#2e8b57", "minilm": "#c7641a"}
NAMES = {"small_cnn": "small CNN", "efficientnet": "EfficientNet-Lite0", "minilm": "MiniLM"}
WORDS = {
    "learning_rate": "learning rate", "steps": "steps", "batch_size": "batch size",
    "samples": "training examples", "weight_decay": "weight decay", "label_noise": "label noise",
    "experts": "number of experts", "spread_of_rates": "unequal learning rates",
    "spread_of_steps": "unequal steps", "distance": "distance from the base",
    "late": "late, not early checkpoint",
}  # fmt: skip
UNITS = {
    "learning_rate": "doubled", "steps": "doubled", "batch_size": "doubled", "samples": "doubled",
    "weight_decay": "0.01, not 0 or 0.0001", "label_noise": "60 % of the labels random",
    "experts": "doubled", "spread_of_rates": "standard deviation one doubling more",
    "spread_of_steps": "standard deviation one doubling more", "distance": "doubled",
    "late": "the run's end, not its quarter or half",
}  # fmt: skip
SHOWN = 14.0
"""Points at which the picture's axis ends."""


def picture(told: Mapping[str, Any]) -> str:
    """Return effects on retention and on merged accuracy with intervals, knob under knob."""
    rows = [
        (knob, family, found["effects"][knob])
        for knob in told["verdicts"]
        for family, found in told["families"].items()
        if knob in found["effects"]
    ]
    height = TOP + ROW * len(rows) + 50
    half = (WIDTH - LEFT - 40) / 2
    root = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height}",
            "width": str(WIDTH), "height": str(height), "role": "img",
            "aria-label": "Effect of each setting of experts on merges",
            "font-family": "sans-serif", "font-size": "11",
        },
    )  # fmt: skip
    add(root, "rect", {"width": WIDTH, "height": height, "fill": "white"})
    for panel, title in enumerate(("retention, points", "merged accuracy, points")):
        start = LEFT + panel * (half + 20)
        middle = {"x": start + half / 2, "text-anchor": "middle"}
        add(root, "text", {**middle, "y": 16, "font-weight": "bold"}, title)
        for value in (-10, -5, 0, 5, 10):
            at = _x(value, start, half)
            stroke = "#444" if value == 0 else "#ddd"
            add(root, "line", {"x1": at, "x2": at, "y1": TOP - 12, "y2": height - 40,
                               "stroke": stroke})  # fmt: skip
            add(root, "text", {"x": at, "y": height - 26, "text-anchor": "middle",
                               "fill": "#555"}, str(value))  # fmt: skip
        for place, (_, family, effect) in enumerate(rows):
            part = effect if panel == 0 else effect["merged_accuracy"]
            _interval(root, part, TOP + ROW * place, start, half, COLOURS.get(family, "#555"))
    last = ""
    for place, (knob, _, effect) in enumerate(rows):
        if knob != last:
            arrow = "↑" if effect["predicted"] > 0 else "↓"
            name = {"x": LEFT - 8, "y": TOP + ROW * place + 4, "text-anchor": "end"}
            add(root, "text", name, f"{WORDS[knob]} {arrow}")
        last = knob
    at = 10
    for family in told["families"]:
        colour = COLOURS.get(family, "#555")
        add(root, "circle", {"cx": at + 4, "cy": height - 9, "r": 4, "fill": colour})
        add(root, "text", {"x": at + 12, "y": height - 5, "fill": "#555"}, NAMES[family])
        at += 24 + 7 * len(NAMES[family])
    legend = "Arrow: what the bound says of retention. Lines: 95 % intervals, cut at the edge."
    add(root, "text", {"x": at + 10, "y": height - 5, "fill": "#555"}, legend)
    return written(root) + "\n"


def _interval(
    root: Element, part: Mapping[str, float], y: float, start: float, width: float, colour: str
) -> None:
    ends = {"x1": _x(part["low"], start, width), "x2": _x(part["high"], start, width)}
    add(root, "line", {**ends, "y1": y, "y2": y, "stroke": colour, "stroke-width": 1.5})
    clear = part["low"] > 0 or part["high"] < 0
    spot = {"cx": _x(part["effect"], start, width), "cy": y, "r": 4, "stroke": colour}
    add(root, "circle", {**spot, "fill": colour if clear else "white"})


def _x(value: float, start: float, width: float) -> float:
    return start + width * (min(max(value, -SHOWN), SHOWN) + SHOWN) / (2 * SHOWN)


def page(told: Mapping[str, Any], experiment: Mapping[str, Any] | None) -> str:
    """Return the page."""
    families = told["families"]
    lines = [
        "# Advice for fine-tuning, tested on the atlas",
        "",
        "`mergewell advise` takes its directions from a bound (a bound of the same family as that",
        "of arXiv:2601.21690, whose own statement could not be read; its constants are loose).",
        "Here the sign of each is held against measured merges, and disagreements are stated like",
        "agreements. Everything on this page is made from the tables of `benchmarks/atlas/results`",
        "by",
        "",
        "    python benchmarks/atlas/advice.py",
        "",
        f"(a minute). {told['merges']:,} merges in which nothing was broken on purpose, of experts",
        f"from {told['runs']:,} fine-tunings: "
        + "; ".join(
            f"{NAMES[f]} {one['merges']:,} merges, {one['sets']} sets, {one['runs']} fine-tunings"
            for f, one in families.items()
        )
        + ".",
        "",
        "## In short",
        "",
        *_short(told),
        "",
        "![Effects of settings on retention and merged accuracy](advice.svg)",
        "",
        "## Predicted and measured",
        "",
        "Points of retention (100 × merged / own accuracy, cut at 150) and of merged accuracy",
        "where the setting is turned up in all experts of a merge. In brackets 95 % intervals.",
        "",
        "| setting | by | bound | family | retention | verdict | merged accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for knob in told["verdicts"]:
        for family, found in families.items():
            if knob not in found["effects"]:
                continue
            one = found["effects"][knob]
            lines.append(
                f"| {WORDS[knob]} | {UNITS[knob]} | {'+' if one['predicted'] > 0 else '−'} | "
                f"{NAMES[family]} | {_effect(one)} | {one['verdict']} | "
                f"{_effect(one['merged_accuracy'])} |"
            )
    lines += ["", *_own(families), "", *_optimum(families), "", *_norms(families)]
    lines += ["", *_groups(families), "", *_ranks(families)]
    if experiment is not None:
        lines += ["", *_experiment(experiment)]
    return "\n".join([*lines, "", *_method(told), ""])


def _effect(part: Mapping[str, float]) -> str:
    return _signed(f"{part['effect']:+.1f} [{part['low']:.1f}, {part['high']:.1f}]")


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _short(told: Mapping[str, Any]) -> list[str]:
    """Return one line a verdict, and what both outcomes say together."""
    by: dict[str, list[str]] = {}
    for knob, said in told["verdicts"].items():
        by.setdefault(said, []).append(WORDS[knob])
    heads = {
        "agrees": "**The bound's sign is borne out** (an interval without 0 in one family or more, "
        "none against it)",
        "disagrees": "**The bound's sign is contradicted**",
        "mixed": "**Families contradict each other**",
        "open": "**Open** (0 lies in every interval)",
    }
    lines = [f"- {head}: {', '.join(by[said])}." for said, head in heads.items() if said in by]
    trade: list[str] = []
    for family, found in told["families"].items():
        for knob, one in found["effects"].items():
            accuracy = one["merged_accuracy"]
            against = accuracy["low"] > 0 or accuracy["high"] < 0
            if against and one["verdict"] != "open" and accuracy["effect"] * one["effect"] < 0:
                trade.append(
                    f"{WORDS[knob]} ({NAMES[family]}: retention {_effect(one)}, merged accuracy "
                    f"{_effect(accuracy)})"
                )
    if trade:
        lines.append(
            "- **Retention and accuracy part ways**, so that better retention is no better model: "
            + "; ".join(trade)
            + "."
        )
    return lines


def _own(families: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Whose setting it is",
        "",
        "The same effects on retention, split: the setting of the expert whose task is measured,",
        "and the mean setting of those that it was merged with.",
        "",
        "| setting | family | own | the others' |",
        "|---|---|---|---|",
    ]
    for family, found in families.items():
        lines += [
            f"| {WORDS[knob]} | {NAMES[family]} | {_effect(one['own'])} | "
            f"{_effect(one['others'])} |"
            for knob, one in found["effects"].items()
            if "own" in one
        ]
    return lines


def _optimum(families: Mapping[str, Any]) -> list[str]:
    lines = [
        "## An optimum inside?",
        "",
        "The bound has one: more training lowers the experts' own loss and raises the rest. Merged",
        "accuracy on the mean of log2 (distance from the base) and its square; a negative square",
        "bends down.",
        "",
    ]
    for family, found in families.items():
        one = found["optimum"]
        low, high = one["seen"]
        if one["at"] is None:
            where = "it does not bend down"
        else:
            place = "inside" if one["inside"] else "outside"
            where = f"its top is at {one['at']:.2g} of the base's norm, {place} what was seen"
        lines.append(
            f"- {NAMES[family]}: square {_effect(one)} points ({one['verdict']}); {where} "
            f"(90 % of merges: {low:.2g} to {high:.2g})."
        )
    return lines


def _norms(families: Mapping[str, Any]) -> list[str]:
    lines = [
        "## What the task vector's norm grows with",
        "",
        "The bound's elasticities take ||τ|| to grow as rate × steps, and not with the batch.",
        "Powers measured over fine-tunings, label noise left out:",
        "",
        "| family | optimiser | runs | rate (1) | steps (1; a random walk 0.5) | batch (0) | "
        "examples (0) |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, found in families.items():
        for optimiser, one in found["norms"].items():
            cells = (
                _signed(f"{one[k]['effect']:.2f} [{one[k]['low']:.2f}, {one[k]['high']:.2f}]")
                for k in ("learning_rate", "steps", "batch_size", "samples")
            )
            lines.append(f"| {NAMES[family]} | {optimiser} | {one['runs']} | {' | '.join(cells)} |")
    return lines


def _groups(families: Mapping[str, Any]) -> list[str]:
    knobs = ("learning_rate", "steps", "batch_size", "samples", "experts")
    told: list[str] = []
    lines = [
        "## By kind of method",
        "",
        "Effects on retention. Averaging: average, task arithmetic, slerp, model stock, RegMean,",
        "BMM; sparsifying: TIES, DARE, breadcrumbs, DELLA, PCB, SCE, MagMax; spectral: TSV, Iso.",
        "",
        f"| family | methods | {' | '.join(WORDS[k] for k in knobs)} |",
        f"|---|---|{'---|' * len(knobs)}",
    ]
    for family, found in families.items():
        for name, one in found["groups"].items():
            cells = " | ".join(_effect(one[k]) if k in one else "" for k in knobs)
            lines.append(f"| {NAMES[family]} | {name} | {cells} |")
        if {"averaging", "sparsifying"} <= set(found["groups"]):
            one, other = (found["groups"][n]["steps"] for n in ("averaging", "sparsifying"))
            word = "more" if other["effect"] < one["effect"] else "less"
            told.append(f"{NAMES[family]}: {word} ({_effect(other)} beside {_effect(one)})")
    if told:
        lines += [
            "",
            "That sparsifying methods bear longer training (OpenReview KVAdINcwe5) is not what the",
            "atlas shows where steps cost them more than averaging: " + "; ".join(told) + ".",
        ]
    return lines


def _ranks(families: Mapping[str, Any]) -> list[str]:
    return [
        "## Settings alone as a predictor",
        "",
        "Rank correlation over merges with the mean retention, of V as if task vectors were",
        "orthogonal, from rate × steps (each optimiser's rates about its own middle) and from the",
        "checkpoints' norms, and of the number of experts: "
        + "; ".join(
            _signed(
                f"{NAMES[f]} {one['ranks']['rate_times_steps']:.2f}, "
                f"{one['ranks']['distance']:.2f} and {one['ranks']['experts']:.2f}"
            )
            for f, one in families.items()
        )
        + ".",
        "`mergewell check` predicts far better (prediction.md): a direction for fine-tuning is all",
        "that this is for.",
    ]


def _experiment(told: Mapping[str, Any]) -> list[str]:
    """Return what fine-tuning with penalties and SAM did, from fine_tuning.json."""
    return [
        "## L2-SP, SAM and weight-scope alignment",
        "",
        *told["text"],
        "",
        "| way | own accuracy | distance | " + " | ".join(told["columns"]) + " |",
        "|---|---|---|" + "---|" * len(told["columns"]),
        *(f"| {' | '.join(row)} |" for row in told["table"]),
    ]


def _method(told: Mapping[str, Any]) -> list[str]:
    return [
        "## How",
        "",
        "A row is an expert of a merge. Least squares of its retention (and of its merged",
        "accuracy) on the settings of its own expert, the mean settings of the others, log2 of",
        "their number and the spread of rates and steps, with optimiser and unfinished schedule",
        "beside them, within base and task, and within method and scale. Rates count about the",
        "median of their optimiser. `late` is compared within fine-tunings: the end of a run (its",
        "rate gone to 0) beside its checkpoint at a quarter (small CNN) or half. Distance is a",
        "regression of its own, as it lies between settings and retention.",
        f"Intervals: {told['draws']} draws in which every set of experts and every fine-tuning",
        "gets an exponential weight and a row the product of its two.",
        "",
        "What speaks against it: settings were drawn at random, so that effects are causal within",
        "these families, and are means over their ranges: a curve has other slopes elsewhere.",
        "Retention divides by the expert's own accuracy; an expert that learned nothing keeps all",
        "of it, which is why merged accuracy stands beside it. Momentum was 0.9 wherever there was",
        "one; weight decay was at most 0.01. Fine-tunings are short. Many intervals are looked at:",
        "of twenty that hold no effect one misses 0 by chance.",
    ]
