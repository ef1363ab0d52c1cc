"""The page: one HTML file that holds everything, asks the network for nothing and needs no script.

First the verdict and its reasons, then what was measured, every figure's numbers in a table too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mergewell.report import (
    figures,
    findings,
    layer_figures,
    numbers,
    place_figures,
    prediction,
    story,
)
from mergewell.report.files import write_page_text
from mergewell.report.html import render
from mergewell.report.results import (
    MEAN,
    Check,
    Cutoffs,
    LayerMLoss,
    Matrix,
    Results,
    read_results,
)

WHOLE = "all"
"""The key under which the time of all steps together may stand."""


def write_page(results_dir: Path) -> Path:
    """Write the page of a folder's `results.json` beside it, and return its path.

    Raises:
        DataError: no readable `results.json`, or one that breaks the contract.
        OutputError: the folder cannot be written.
    """
    results = read_results(results_dir)
    return write_page_text(results_dir / results.report, render_page(results))


def write_check_page(check: Check, path: Path) -> Path:
    """Write the page of a check alone, and return its path.

    Raises:
        OutputError: the folder cannot be written, or something else stands there.
    """
    return write_page_text(path, render_page(Results.of_check(check)))


def render_page(results: Results) -> str:
    """Return the page as one HTML text; what the results do not hold is left out."""
    values = {"results": results, "check": results.check, **_told(results), **_drawn(results)}
    values |= {**_expected(results.check), "measured": results.retention}
    return render("page.html.jinja", {**values, **_found(results)})


def _expected(check: Check | None) -> dict[str, Any]:
    """Return what the check predicts, in sentences and drawn over what the atlas measured."""
    found = prediction.prediction_of(check) if check is not None else None
    if found is None:
        return {"outlook": None}
    return {
        "outlook": prediction.outlook(found),
        "span": prediction.span,
        "scatter": Markup(prediction.scatter(found)) if found.points else "",
        "sizes": found.sizes,
    }


def _told(results: Results) -> dict[str, Any]:
    """Return the sentences and rankings that the template sets."""
    merits = story.ranking(results)
    check = results.check
    samples = check.samples if check else None
    steps = {step: time for step, time in results.seconds.items() if step != WHOLE}
    return {
        "verdict": story.verdict(results),
        "reasons": story.reasons(results),
        "merits": merits,
        "as_good": story.as_good(merits),
        "best_merge": story.command_of(results, merits[0].method) if merits else None,
        "layer_sentence": story.layer_sentence(results.units) if results.units else "",
        "node_sentence": story.node_sentence(results.units),
        "cosine_sentence": story.cosine_sentence(results),
        "uncovered": _uncovered(check) if check else {},
        "left_open": findings.left_open(check) if check else [],
        "mode": story.MODE_WORDS.get(check.mode, check.mode) if check and check.mode else "",
        "samples": f"{samples:,}" if samples else "",
        "figures_of_check": _scalars(check) if check else {},
        "matrices_of_check": _matrices(check) if check else {},
        "norms": results.relative_norms,
        "conflict": results.conflict,
        "steps": steps,
        "total_seconds": results.seconds.get(WHOLE, sum(steps.values())),
    }


def _drawn(results: Results) -> dict[str, Any]:
    """Return the figures and the plain data that stands in the tables under them."""
    merits = story.ranking(results)
    series = figures.accuracy_series(results, merits[0].method if merits else None)
    layers, cutoffs = results.units, results.cutoffs
    wholes = results.wholes
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
        "wholes": wholes,
        "counts": layer_figures.level_counts(layers, cutoffs),
        "strip": _figure(layer_figures.layer_strip, layers, cutoffs),
        "profile": (
            Markup(layer_figures.layer_strip(layers, cutoffs, 120))
            if len(layers) > layer_figures.BARS
            else ""
        ),
        "barred": layer_figures.drawn_bars(layers),
        "axis_end": layer_figures.axis_end(max((a.relative for a in layers), default=0.0)),
        "layer_bars": _figure(layer_figures.layer_bars, layer_figures.drawn_bars(layers), cutoffs),
        "whole_bars": _figure(layer_figures.layer_bars, layer_figures.drawn_bars(wholes), cutoffs),
        "node_maps": [(name, Markup(drawing)) for name, drawing in layer_figures.node_maps(layers)],
        "node_groups": layer_figures.node_groups,
        "shades": layer_figures.SHADES,
        "shade_range": layer_figures.shade_range(layers),
        "shade_edges": layer_figures.shade_edges(*layer_figures.shade_range(layers)),
        "head_sentence": story.head_sentence(layers),
        "headed": [layer for layer in layers if layer.heads],
        **_against_ensemble(results),
        "cosine_matrix": (
            Markup(figures.cosine_matrix(_names(results), results.cosine_matrix))
            if results.cosine_matrix
            else ""
        ),
        "names": _names(results),
    }


def _figure(
    draw: Callable[[Sequence[LayerMLoss], Cutoffs], str],
    layers: Sequence[LayerMLoss],
    cutoffs: Cutoffs,
) -> Markup:
    return Markup(draw(layers, cutoffs) if layers else "")


def _found(results: Results) -> dict[str, Any]:
    """Return the check's findings in order, what to do next, and what theory says."""
    check = results.check
    theory = findings.theory_layers(results.layers)
    ratios = {layer.layer: layer.ratio for layer in theory if layer.ratio is not None}
    steps = findings.next_steps(check) if check and check.findings else ()
    return {
        "deciding": findings.deciding(check) if check else (),
        "compared": findings.compared(check) if check else (),
        "compared_words": findings.COMPARED,
        "next_steps": steps,
        "measure": findings.measure,
        "shown": findings.shown,
        "places": [
            (one, Markup(_place_chart(one))) for one in (findings.places(check) if check else ())
        ],
        "pooled": place_figures.pooled,
        "theory": theory,
        "theory_sentence": findings.theory_sentence(theory),
        "ratio_chart": (
            Markup(
                place_figures.place_chart(
                    ratios,
                    title="Measured over expected",
                    along=True,
                    show=numbers.number,
                    mark=1.0,
                )
            )
            if len(ratios) > 1
            else ""
        ),
    }


def _place_chart(one: findings.Places) -> str:
    unit = one.finding.unit
    return place_figures.place_chart(
        one.values,
        title=one.finding.question,
        along=one.along,
        show=lambda value: findings.shown(value, unit),
    )


def _against_ensemble(results: Results) -> dict[str, Any]:
    """Return how far each merge is from the ensemble, and bars of how often they agree."""
    mean = {
        method: math.fsum(table.values()) / len(table)
        for method, table in results.agreement.items()
        if table
    }
    rows = story.against_ensemble(results)
    kinds = {row.method: row.method == (rows[0].method if rows else "") for row in rows}
    series = [
        figures.Series(
            method, "best" if kinds.get(method) else "merge", {MEAN: value}, dict[str, Any]()
        )
        for method, value in mean.items()
    ]
    title = "agreement with the ensemble"
    bars = figures.accuracy_bars(series, MEAN, title=title) if series else ""
    return {"points": numbers.points, "against": rows, "agreement_bars": Markup(bars)}


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
