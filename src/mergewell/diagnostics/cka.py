"""Do the experts, and the merge, still see the inputs alike?"""

from __future__ import annotations

from statistics import median
from typing import ClassVar

from torch import Tensor

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import mean, pair_values, rows_of
from mergewell.statistics.activation_cka import FEWEST, linear_cka


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
    asks: ClassVar[str] = "Asks for inputs (`--data`)."

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the median over blocks of the experts' mean CKA with the merge as the value."""
        if not evidence.features or self.objection(evidence):
            return None
        matrices = {name: linear_cka(models) for name, models in evidence.features.items()}
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
        merged = [linear_cka(f)[1:-1, -1] for f in evidence.features.values()]
        if merged and not any(_defined(row) for row in merged):
            return "CKA compares how features vary over the samples, and they do not vary."
        return ""


def _defined(values: Tensor) -> list[float]:
    return [float(value) for value in values[values.isfinite()]]
