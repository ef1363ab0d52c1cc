"""The page: one HTML file that holds everything, asks the network for nothing and needs no script.

A content security policy with the hashes of our own style and script makes the browser keep that
promise, whatever a task or a model is called.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mergewell.report import figures, numbers, story, svg
from mergewell.report.results import (
    MEAN,
    Check,
    Matrix,
    Results,
    read_results,
    write_text,
)

HERE = Path(__file__).parent
WHOLE = "all"
"""The key under which the time of all steps together may stand."""


def write_page(results_dir: Path) -> Path:
    """Write the page of a folder's `results.json` beside it, and return its path.

    Raises:
        DataError: no readable `results.json`, or one that breaks the contract.
        OutputError: the folder cannot be written.
    """
    results = read_results(results_dir)
    return write_text(results_dir / results.report, render_page(results))


def write_check_page(check: Check, path: Path) -> Path:
    """Write the page of a check alone, and return its path.

    Raises:
        OutputError: the folder cannot be written.
    """
    return write_text(path, render_page(Results.of_check(check)))


def render_page(results: Results) -> str:
    """Return the page as one HTML text; what the results do not hold is left out."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = numbers.percent
    environment.filters["number"] = numbers.number
    environment.filters["fixed"] = numbers.fixed
    environment.filters["seconds"] = numbers.seconds
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(
        results=results,
        check=results.check,
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        **_told(results),
        **_drawn(results),
    )


def _told(results: Results) -> dict[str, Any]:
    """Return the sentences and rankings that the template sets."""
    merits = story.ranking(results)
    check = results.check
    samples = check.samples if check else None
    steps = {step: time for step, time in results.seconds.items() if step != WHOLE}
    return {
        "verdict": story.verdict(results),
        "level_words": svg.LEVEL_WORDS,
        "level_marks": {level: Markup(_mark(shape)) for level, shape in svg.LEVEL_SHAPES.items()},
        "reasons": story.reasons(results),
        "measure": story.measure,
        "merits": merits,
        "as_good": story.as_good(merits),
        "best_merge": story.command_of(results, merits[0].method) if merits else None,
        "layer_sentence": story.layer_sentence(results.layers) if results.layers else "",
        "node_sentence": story.node_sentence(results.layers),
        "cosine_sentence": story.cosine_sentence(results),
        "uncovered": _uncovered(check) if check else {},
        "mode": story.MODE_WORDS.get(check.mode, check.mode) if check and check.mode else "",
        "samples": f"{samples:,}" if samples else "",
        "figures_of_check": _scalars(check) if check else {},
        "matrices_of_check": _matrices(check) if check else {},
        "norms": results.relative_norms,
        "conflict": results.conflict,
        "listed": numbers.listed,
        "percent_range": numbers.percent_range,
        "counted": numbers.counted,
        "steps": steps,
        "total_seconds": results.seconds.get(WHOLE, sum(steps.values())),
    }


def _drawn(results: Results) -> dict[str, Any]:
    """Return the figures and the plain data that stands in the tables under them."""
    merits = story.ranking(results)
    series = figures.accuracy_series(results, merits[0].method if merits else None)
    layers, cutoffs = results.layers, results.cutoffs
    panels = [(MEAN, f"Mean of {numbers.counted(len(results.tasks), 'task')}")]
    panels = (panels if len(results.tasks) > 1 else []) + [(task, task) for task in results.tasks]
    return {
        "series": series,
        "columns": (*results.tasks, MEAN),
        "panels": [
            (title, Markup(figures.accuracy_bars(series, task, title=title)))
            for task, title in panels
            if series
        ],
        "layers": layers,
        "cutoffs": cutoffs,
        "counts": figures.level_counts(layers, cutoffs),
        "strip": Markup(figures.layer_strip(layers, cutoffs)) if layers else "",
        "layer_bars": Markup(figures.layer_bars(layers, cutoffs)) if layers else "",
        "node_map": Markup(figures.node_map(layers)) if any(a.node for a in layers) else "",
        "node_groups": figures.node_groups,
        "shades": figures.SHADES,
        "shade_range": figures.shade_range(layers),
        "cosine_matrix": (
            Markup(figures.cosine_matrix(_names(results), results.cosine_matrix))
            if results.cosine_matrix
            else ""
        ),
        "names": _names(results),
    }


def _names(results: Results) -> tuple[str, ...]:
    count = len(results.cosine_matrix)
    return results.experts or tuple(f"expert {index + 1}" for index in range(count))


def _uncovered(check: Check) -> Mapping[str, tuple[str, ...]]:
    """Return the layers that the check did not cover, by reason."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in check.uncovered:
        reason = check.uncovered_reasons.get(layer, "no reason given")
        found[reason] = (*found.get(reason, ()), layer)
    return found


def _scalars(check: Check) -> dict[str, float | None]:
    return {name: value for name, value in check.predictors.items() if not isinstance(value, tuple)}


def _matrices(check: Check) -> dict[str, Matrix]:
    return {name: value for name, value in check.predictors.items() if isinstance(value, tuple)}


def _mark(shape: str) -> str:
    return f'<svg class="icon" viewBox="-7 -7 14 14" aria-hidden="true"><path d="{shape}"/></svg>'


def _policy(style: str, script: str) -> str:
    def source(text: str) -> str:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

    return (
        f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
