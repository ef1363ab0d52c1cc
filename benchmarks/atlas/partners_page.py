"""Writes docs/studies/partners.md from partners.json.

python benchmarks/atlas/partners_page.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

STUDIES = Path(__file__).parents[2] / "docs/studies"
DRAWS = 2000
WAYS = {
    "labelled pairs": "mean retention of the pairs (labels)",
    "unlabelled pairs": "answers the pairs keep, 16 unlabelled inputs (`partners --data`)",
    "kinship": "mean kinship of the pairs (weights alone, `partners`)",
    "group itself": "the group's own average on the same unlabelled inputs",
}


def interval(values: Sequence[float], digits: int = 2, factor: float = 1.0) -> str:
    """Return a mean with its 95 % interval over resampled sets."""
    given = factor * np.asarray(values, float)
    rng = np.random.default_rng(0)
    means = given[rng.integers(0, len(given), (DRAWS, len(given)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{given.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def page(study: dict[str, Any]) -> str:
    """Return the page."""
    sets = study["sets"]
    return "\n".join([*_head(sets), *_groups(sets), *_greedy(sets), *_law(sets), *_how(), ""])


def _head(sets: Sequence[dict[str, Any]]) -> list[str]:
    return [
        "# Which experts, and how many: what can be told beforehand",
        "",
        f"{len(sets)} sets of six experts of the atlas' small CNN, each of another task, drawn",
        "from three bases. All 57 groups of a set are averaged and measured: retention on tests,",
        "answers kept on 16 unlabelled inputs a task. Intervals are 95 %, over resampled sets.",
        "",
    ]


def _groups(sets: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## Pairs foretell groups",
        "",
        "Rank correlation with the measured retention of a set's groups of one size, and how",
        "many points of retention the group chosen by it is below the best one.",
        "",
        "| foretold from | 3 experts: ρ | points lost | 4: ρ | points lost | 5: points lost |",
        "|---|---|---|---|---|---|",
    ]
    for name, words in WAYS.items():
        cells: list[str] = []
        for size in ("3", "4", "5"):
            some = [one["sizes"][size][name] for one in sets]
            if size != "5":
                cells.append(interval([one["rho"] for one in some]))
            cells.append(interval([one["regret"] for one in some], 1, 100))
        lines.append(f"| {words} | {' | '.join(cells)} |")
    lost = [
        interval([s["sizes"][k]["best"] - s["sizes"][k]["mean"] for s in sets], 1, 100)
        for k in ("3", "4", "5")
    ]
    lines.append(f"| a group drawn at random | 0 | {lost[0]} | 0 | {lost[1]} | {lost[2]} |")
    return [*lines, ""]


def _greedy(sets: Sequence[dict[str, Any]]) -> list[str]:
    found = [one["greedy"] for one in sets]
    gain = [one["best"] - one["average"] for one in found]
    kept = [one["kept_best"] - one["kept_average"] for one in found]
    tries = np.mean([one["merges"] for one in found])
    why = {one["stopped"] for one in found}
    ends = ", ".join(f"{w!r} {sum(one['stopped'] == w for one in found)}" for w in sorted(why))
    return [
        "## The greedy search",
        "",
        "Top-3 greedy merging with exploration (`mergewell.partners.greedy`), scored by answers",
        "kept on all six tasks' unlabelled inputs, beside the plain average of all six.",
        "",
        f"- Retention, six tasks: {interval(gain, 1, 100)} points above the average;",
        f"  better on {sum(g > 0 for g in gain)} of {len(gain)} sets. By its own score it gained "
        f"{interval(kept, 1, 100)}.",
        f"- {tries:.0f} merges were tried on average; the search ended: {ends}.",
        "",
    ]


def _law(sets: Sequence[dict[str, Any]]) -> list[str]:
    laws = [one["law"] for one in sets]
    there = [law for law in laws if law["foretold"] is not None]
    lines = [
        "## The scaling law",
        "",
        "L(k) = floor + A / (k + b) through the answers kept by all groups of 2, 3 and 4, asked",
        f"for the average of six. {len(there)} of {len(laws)} sets follow a law there.",
        "",
    ]
    if there:
        off = [abs(law["foretold"] - law["by_size"]["6"]) for law in there]
        flat = [abs(law["by_size"]["4"] - law["by_size"]["6"]) for law in there]
        line = [
            abs(2 * law["by_size"]["4"] - law["by_size"]["2"] - law["by_size"]["6"])
            for law in there
        ]
        lines += [
            f"There it is off by {interval(off, 1, 100)} points at six; a line through 2",
            f"and 4 by {interval(line, 1, 100)}, the value at four taken as it is by "
            f"{interval(flat, 1, 100)}.",
            "",
        ]
    return lines


def _how() -> list[str]:
    return [
        "## How",
        "",
        "```text",
        "python benchmarks/atlas/partners.py --data ../shared/data   # experts: benchmarks/atlas",
        "python benchmarks/atlas/partners_page.py",
        "```",
        "",
        "One architecture, averages only, finished experts (no broken ones); experts that learned",
        "little are among them, as in the atlas. Retention is merged over own accuracy.",
    ]


if __name__ == "__main__":
    study = json.loads((STUDIES / "partners.json").read_text())
    (STUDIES / "partners.md").write_text(page(study))
