"""Measure: one task and one number for a model that does it, made of one row of scores an example.

Shapes: N examples; r rows, of which the second, if there is one, divides the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mergewell.errors import ModelError

Rows = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measure:
    """How a model does at one task.

    The number is the mean of the first row, over that of the second if there is one, and of that
    the exponential if `exponential`: so accuracy and perplexity are both bootstrapped by example.
    """

    task: str
    metric: str
    """What the number is called, such as accuracy."""

    rows: Callable[[nn.Module], Rows]
    """Runs a module and returns a score an example, [r, N]; N is 1 where there is just a number."""

    higher: bool = True
    """Whether more is better."""

    exponential: bool = False

    expert: int | None = None
    """Which expert, from 0, was fine-tuned for the task; None where that is not known."""

    needs_folder: bool = False
    """Whether only models of Hugging Face folders can do it, as it takes their tokenizer."""

    def scores(self, module: nn.Module) -> Rows:
        """Return the rows of a module, [r, N].

        Raises:
            ModelError: there is none, or one is not finite.
            UserError: as `rows`.
        """
        found = np.atleast_2d(np.asarray(self.rows(module), dtype=np.float64))
        if found.size == 0 or not np.isfinite(found).all():
            raise ModelError(
                f"{self.metric} on {self.task} is not a finite number for this model; its weights "
                "are damaged, or the metric has no examples."
            )
        return found

    def value(self, means: Rows) -> Rows:
        """Return the number [...] of means of the rows [..., r]."""
        found = means[..., 0] / means[..., 1] if means.shape[-1] == 2 else means[..., 0]
        return np.exp(found) if self.exponential else found


@dataclass(frozen=True, slots=True)
class Goal:
    """Measures as what learners and `tune` look for; more is better, less is lost."""

    measures: Sequence[Measure]

    def __call__(self, module: nn.Module) -> float:
        """Return the mean over the measures, of what is better when it is less the negative.

        This is a `learners.base.Metric`: greedy soup and all that choose by one take it. Perplexity
        counts by its logarithm.
        """
        return float(-np.mean([losses.mean() for losses in self.losses(module)]))

    def losses(self, module: nn.Module) -> tuple[Rows, ...]:
        """Return by measure what each example costs, [N]: what `tune.search.tune` compares by."""
        return tuple(self._losses(each, each.scores(module)) for each in self.measures)

    def _losses(self, measure: Measure, rows: Rows) -> Rows:
        by_example = rows[0] / rows[1].mean() if len(rows) == 2 else rows[0]
        return -by_example if measure.higher else by_example
