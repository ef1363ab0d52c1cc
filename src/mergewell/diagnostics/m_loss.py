"""Do averaged parameters act like averaged outputs, layer by layer?"""

from __future__ import annotations

from statistics import median
from typing import ClassVar

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, Level, level_of

FAIR, POOR = 0.05, 0.2
"""Relative M-Loss from which a layer is called fair, and poor; reading aids, not fitted."""


class MLoss(Diagnostic):
    """Do averaged parameters act like averaged outputs, layer by layer?

    The relative layer M-Loss: the norm of the gap between merging and ensembling a layer, as a
    fraction of the ensemble's norm.

    Paper: Wang et al. 2026, "M-Loss", arXiv:2602.08564.
    Departures: relative, so that layers can be compared; the levels are reading aids and were not
    fitted to measured merges.
    """

    asks: ClassVar[str] = "Asks for inputs (`--data`)."

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the median over layers as the value; None without data.

        Whole blocks and the network's output hold layers and count only where nothing else does.
        """
        if not evidence.layers:
            return None
        single = [layer for layer in evidence.layers if layer.kind not in ("block", "output")]
        losses = {layer.layer: layer.relative for layer in single or evidence.layers}
        worst = max(losses, key=losses.__getitem__)
        middle = median(losses.values())
        return Finding(
            question="Do averaged parameters act like averaged outputs?",
            verdict=(
                f"In the median layer the merge differs from the ensemble by {_percent(middle)} of "
                f"its output; {worst} disagrees most, by {_percent(losses[worst])}."
            ),
            level=layer_level(middle),
            where=worst,
            value=middle,
            unit="relative M-Loss, median over layers",
            advice=(
                f"Spend care on {worst}: merge it with fewer experts, lower coefficients or "
                "another method by a rule."
                if losses[worst] >= FAIR
                else ""
            ),
            predictors={
                "m_loss_median": middle,
                "m_loss_worst": losses[worst],
                "m_loss_mean": sum(losses.values()) / len(losses),
            },
        )


def layer_level(relative: float) -> Level:
    """Return the level of one layer's relative M-Loss."""
    return level_of(relative, good=FAIR, poor=POOR)


def layer_verdict(relative: float) -> str:
    """Return one layer's verdict in plain words."""
    if relative == 0:
        return "merging and ensembling are the same here"
    words = {
        "good": "merging acts like ensembling",
        "fair": "merging loses a little against ensembling",
        "poor": "merging and ensembling part here",
    }
    return words[layer_level(relative)]


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"
