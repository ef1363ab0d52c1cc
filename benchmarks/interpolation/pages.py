"""Make docs/studies/wise_ft and interpolation (.md, .json, .svg) of the rows that were measured.

python benchmarks/interpolation/pages.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "scale"))

import stages
import wise_ft
from curves import Mean, Panel, data_of, draw, mean_of, percents

HERE = Path(__file__).parent
STUDIES = HERE.parents[1] / "docs" / "studies"
TITLES = {
    "small_cnn": "small CNN, 174 k", "efficientnet": "EfficientNet-Lite0, 3.4 M",
    "minilm": "MiniLM, 22.7 M", "language": "SmolLM2-135M",
}  # fmt: skip
KINDS = {"own": "own task", "shift": "own task, shifted", "other": "other tasks"}
Row = dict[str, str]


def main() -> None:
    """Write both pages."""
    page("wise_ft", *of_wise_ft(wise_ft.rows()))
    page("interpolation", *of_stages(stages.rows()))


def page(name: str, text: str, data: dict[str, Any], panels: Sequence[Panel]) -> None:
    """Write a page with its figures."""
    head = (HERE / f"{name}.head.md").read_text(encoding="utf-8").rstrip()
    (STUDIES / f"{name}.md").write_text(f"{head}\n\n{text}\n", encoding="utf-8")
    content = json.dumps({"version": 1, **data}, indent=1) + "\n"
    (STUDIES / f"{name}.json").write_text(content, encoding="utf-8")
    draw(STUDIES / f"{name}.svg", head.partition("\n")[0].removeprefix("# "), panels)


def of_wise_ft(every: Sequence[Row]) -> tuple[str, dict[str, Any], list[Panel]]:
    """Return the tables of WiSE-FT, their data and panels."""
    parts: list[str] = []
    families: list[dict[str, Any]] = []
    panels: list[Panel] = []
    for family in dict.fromkeys(row["family"] for row in every):
        some = [row for row in every if row["family"] == family]
        alphas = sorted({float(row["alpha"]) for row in some})
        curves = {
            kind: [spread(some, family, kind, {alpha: 1.0}) for alpha in alphas] for kind in KINDS
        }
        ends = {
            kind: [spread(some, family, kind, {0.5: 1.0, end: -1.0}) for end in (0.0, 1.0)]
            for kind in KINDS
        }
        lines = [
            f"| {alpha:g} | {' | '.join(percents(curves[kind][i]) for kind in KINDS)} |"
            for i, alpha in enumerate(alphas)
        ]
        said = [
            f"| {title} | {points(ends[kind][0])} | {points(ends[kind][1])} | "
            f"{'yes' if all(end.low > 0 for end in ends[kind]) else 'no'} |"
            for kind, title in KINDS.items()
        ]
        parts.append(
            f"## {TITLES[family]}\n{units(some, family)}\n\n"
            f"| alpha | {' | '.join(KINDS.values())} |\n|---|---|---|---|\n"
            + "\n".join(lines)
            + "\n\nThe midpoint less each end, in points:\n\n"
            "| judged on | less the base | less the expert | above both for certain |\n"
            "|---|---|---|---|\n" + "\n".join(said)
        )
        families.append(
            {
                "name": family, "alphas": alphas,
                "curves": {kind: [data_of(m) for m in curve] for kind, curve in curves.items()},
                "midpoint_less": {
                    kind: {"base": data_of(two[0]), "expert": data_of(two[1])}
                    for kind, two in ends.items()
                },
            }
        )  # fmt: skip
        named = {KINDS[kind]: curve for kind, curve in curves.items()}
        names = [f"{alpha:g}" for alpha in alphas]
        panels.append(Panel(TITLES[family], "alpha: 0 base, 1 expert", alphas, names, named))
    return "\n\n".join(parts), {"families": families}, panels


def units(some: Sequence[Row], family: str) -> str:
    """Return what intervals of a family are over."""
    pairs = sorted({(row["seed"], row["task"]) for row in some})
    tasks = sorted({task for _, task in pairs})
    seeds = sorted({seed for seed, _ in pairs})
    over = f"the {len(seeds)} seeds" if family == "small_cnn" else f"the {len(pairs)} experts"
    return (
        f"{len(pairs)} experts: {len(seeds)} seeds of {', '.join(tasks)}. Accuracy in %; 95 % "
        f"intervals by Student's t over {over}."
    )


def spread(some: Sequence[Row], family: str, kind: str, weights: dict[float, float]) -> Mean:
    """Return the mean of a weighted sum of accuracies at some coefficients, by seed or expert."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for seed, task in sorted({(row["seed"], row["task"]) for row in some}):
        mine = [
            row
            for row in some
            if (row["seed"], row["task"]) == (seed, task) and row["measure"].startswith(kind)
        ]
        total = 0.0
        for alpha, weight in weights.items():
            found = [float(row["accuracy"]) for row in mine if float(row["alpha"]) == alpha]
            total += weight * sum(found) / len(found)
        groups.setdefault((seed,) if family == "small_cnn" else (seed, task), []).append(total)
    return mean_of([sum(values) / len(values) for values in groups.values()])


def of_stages(every: Sequence[Row]) -> tuple[str, dict[str, Any], list[Panel]]:
    """Return the table of the stages, its data and panels."""
    lines: list[str] = []
    ways: list[dict[str, Any]] = []
    panels: list[Panel] = []
    for family in dict.fromkeys(row["family"] for row in every):
        curves: dict[str, Sequence[Mean]] = {}
        of_family = [row for row in every if row["family"] == family]
        kinds = {
            "base to expert": [r for r in of_family if r["path"].startswith("base to")],
            "expert to expert": [r for r in of_family if not r["path"].startswith("base to")],
        }
        for kind, some in kinds.items():
            if not some:
                continue
            shares = [by_unit(some, family, "as_end", ends) for ends in STRETCHES]
            curve = [by_unit(some, family, "as_end", {x: 1.0}) for x in stages.GRID]
            right = [by_unit(some, family, "accuracy", {x: 1.0}) for x in stages.GRID]
            best = max(range(len(right)), key=lambda i: right[i].value)
            count = len({(row["seed"], row["path"]) for row in some})
            lines.append(
                f"| {TITLES[family]} | {kind} | {count} | {' | '.join(map(percents, shares))} | "
                f"{percents(right[0])} | {percents(right[-1])} | {percents(right[best])} at "
                f"{stages.GRID[best]:g} |"
            )
            curves[kind] = curve
            ways.append(
                {
                    "family": family, "kind": kind, "ways": count, "x": stages.GRID,
                    "as_end": [data_of(mean) for mean in curve],
                    "accuracy": [data_of(mean) for mean in right],
                    "rise": dict(zip(NAMES, map(data_of, shares), strict=True)),
                }
            )  # fmt: skip
        names = [f"{x:g}" if round(10 * x) % 2 == 0 else "" for x in stages.GRID]
        panels.append(Panel(TITLES[family], "x: 0 start, 1 end", stages.GRID, names, curves))
    table = (
        "| model | way | ways | change in [0, 0.4] | in [0.4, 0.6] | in [0.6, 1] | accuracy at the "
        "start | at the end | best |\n" + "|---" * 9 + "|\n" + "\n".join(lines)
    )
    return table, {"ways": ways}, panels


NAMES = ("0 to 0.4", "0.4 to 0.6", "0.6 to 1")
STRETCHES = ({0.4: 1.0, 0.0: -1.0}, {0.6: 1.0, 0.4: -1.0}, {1.0: 1.0, 0.6: -1.0})


def by_unit(some: Sequence[Row], family: str, field: str, weights: dict[float, float]) -> Mean:
    """Return the mean of a weighted sum over places: by seed, or by way where seeds are few."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for seed, path in sorted({(row["seed"], row["path"]) for row in some}):
        values = {
            float(row["x"]): float(row[field])
            for row in some
            if (row["seed"], row["path"]) == (seed, path)
        }
        total = sum(weight * values[x] for x, weight in weights.items())
        groups.setdefault((seed,) if family == "small_cnn" else (seed, path), []).append(total)
    return mean_of([sum(found) / len(found) for found in groups.values()])


def points(mean: Mean) -> str:
    """Return a difference of fractions in points."""
    return f"{100 * mean.value:+.1f} ({100 * mean.low:+.1f} to {100 * mean.high:+.1f})"


if __name__ == "__main__":
    main()
