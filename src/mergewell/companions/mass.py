"""A model merged anew for each input, of the experts whose subspaces hold it (MASS)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mergewell.companions.ops import LowRankCompanion
from mergewell.component import Fraction, Probability


class Mass(LowRankCompanion):
    """A model merged anew for each input, of the experts whose subspaces hold it (MASS).

    First pass: the merged model, whose inputs x of one layer give the residuals
    |x - V_k V_k' x| / |x|; the softmax of their standardised negatives chooses experts. Second
    pass: theta_0 plus the TSV merge of the chosen ones, polar([U]) diag([S]) polar([V])'. A router
    and not a merged model: `mergewell.routing` makes the module and says what it costs.

    Paper: Crisostomi et al. 2025, "MASS: MoErging through adaptive subspace selection",
    arXiv:2504.05342. Departures: the layer is named, or all routed layers have an equal say, where
    the authors pick one by its accuracy; x is the mean over positions unless `pool` says the first
    (the class token); biases are the mean of the chosen experts'; the merged model of the first
    pass and of what is no matrix is any method's (tsv is theirs).
    """

    paper: ClassVar[str] = "arXiv:2504.05342"

    density: Fraction | None = None
    """Share of the directions of each expert that is kept; 1 / K unless given."""

    at: str | None = None
    """The weight of the layer whose inputs are looked at; all that are routed unless given."""

    pool: Literal["mean", "first"] = "mean"
    """What stands for a sample of many positions: their mean, or the first."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the softmax over standardised residuals."""

    threshold: Probability = 0.2
    """Experts with a larger share than this are chosen, the largest always."""

    most: Annotated[int, Field(ge=1)] = 3
    """At most this many experts are chosen."""

    per: Literal["sample", "batch"] = "sample"
    """What is routed: each sample, in groups of one choice, or the whole batch as one."""

    def directions(self, shortest: int, experts: int) -> int:
        """Return the share of the shorter side, one at least."""
        share = 1 / experts if self.density is None else self.density
        return max(1, int(shortest * share + 1e-9))
