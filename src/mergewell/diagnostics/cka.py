"""Do the experts, and the merge, still see the inputs alike?"""

from __future__ import annotations

from statistics import median
from typing import ClassVar

import torch
from torch import Tensor

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import cosines_of, mean, pair_values, rows_of

FEWEST = 4
"""Samples below which the unbiased estimator is not defined."""


class Cka(Diagnostic):
    """Do the experts, and the merge, still see the inputs alike?

    Linear CKA of pooled features, block by block: HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with the
    unbiased HSIC, which needs 4 samples at least and can be below 0. Between experts, and between
    each expert and the merged model.

    Paper: Kornblith et al. 2019, arXiv:1905.00414; the unbiased estimator of Song et al. 2012 as in
    Nguyen et al. 2021, arXiv:2010.15327.
    Departures: over all samples at once; a block in which a model's features do not vary is left
    out. The levels are reading aids, and CKA is blind to anything that rotates the features, so it
    does not decide the verdict.
    """

    decides: ClassVar[bool] = False

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the median over blocks of the experts' mean CKA with the merge as the value."""
        if not evidence.features or self.objection(evidence):
            return None
        matrices = {name: similarities(models) for name, models in evidence.features.items()}
        by_place = {name: mean(_defined(cka[1:-1, -1])) for name, cka in matrices.items()}
        by_place = {name: value for name, value in by_place.items() if value == value}
        between = {name: pair_values(cka[1:-1, 1:-1]) for name, cka in matrices.items()}
        pairs = [mean(values) for values in between.values() if values]
        value, last = median(by_place.values()), list(by_place)[-1]
        worst = min(by_place, key=by_place.__getitem__)
        return Finding(
            question="Do the experts and the merge still see the inputs alike?",
            verdict=(
                f"In the median block the merge's features have a CKA of {value:.2f} with the "
                f"experts'; least in {worst} ({by_place[worst]:.2f})"
                + (f", and {median(pairs):.2f} between experts." if pairs else ".")
            ),
            level=level_of(1 - value, good=0.1, poor=0.5),
            where=worst,
            value=value,
            unit="linear CKA, unbiased, median over blocks",
            advice=(
                f"From {worst} on the models see different things: keep later blocks apart, or "
                "repair the merged features."
                if value < 0.9
                else ""
            ),
            predictors={
                "cka_merged": value,
                "cka_merged_last": by_place[last],
                "cka_last": rows_of(matrices[last][1:-1, 1:-1]),
                **({"cka_experts": median(pairs)} if pairs else {}),
            },
            by_place=by_place,
        )

    def objection(self, evidence: Evidence) -> str:
        """Return why CKA is not defined on these features."""
        samples = min((f.shape[1] for f in evidence.features.values()), default=FEWEST)
        if samples < FEWEST:
            return f"CKA needs at least {FEWEST} samples, but there are {samples}."
        merged = [similarities(f)[1:-1, -1] for f in evidence.features.values()]
        if merged and not any(_defined(row) for row in merged):
            return "CKA compares how features vary over the samples, and they do not vary."
        return ""


def similarities(models: Tensor) -> Tensor:
    """Return the unbiased linear CKA of features [P, N, D] of P models, [P, P]; nan if undefined.

    With centred features the unbiased HSIC is sum (X'Y)^2 and terms in the samples' squared norms
    alone; the sum is made over N x N or D x D products, whichever are smaller.
    """
    wide = models.to(torch.float64)
    centred = wide - wide.mean(1, keepdim=True)
    size = centred.abs().amax((1, 2), keepdim=True)
    # what rounding leaves of features that are all the same does not count as variation
    varied = size > 1e-12 * wide.abs().amax((1, 2), keepdim=True)
    centred = torch.where(varied, centred / torch.where(size == 0, 1.0, size), 0.0)
    samples, width = centred.shape[1:]
    if samples <= width:
        grams = (centred @ centred.mT).flatten(1)
        squares = grams @ grams.T
    else:
        squares = torch.stack(
            [torch.stack([(x.T @ y).square().sum() for y in centred]) for x in centred]
        )
    norms = centred.square().sum(2)
    totals = norms.sum(1)
    own = norms @ norms.T * (1 + 2 / (samples - 2))
    hsic = squares - own + totals[:, None] * totals / (samples - 1) / (samples - 2)
    real = hsic.diagonal() > 1e-9 * totals.square()
    return cosines_of(torch.where(real[:, None], hsic, 0.0))


def _defined(values: Tensor) -> list[float]:
    return [float(value) for value in values[values.isfinite()]]
