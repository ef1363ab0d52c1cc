"""Regress each linear layer on the experts' outputs, with a prior about another merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator
from torch import Tensor

from mergewell.gram import Inputs, anchored, not_shares
from mergewell.methods.base import METHODS, Laws, MergeMethod, Needs, TensorGroup, needs_by
from mergewell.statistics.base import WeightStatistic


def _needs(method: Bmm) -> Needs:
    anchor = method.around.needs
    return Needs(anchor.base, anchor.experts, "matrix", ("gram", *anchor.calibration))


class Bmm(MergeMethod):
    """Regress each linear layer on the experts' outputs, with a prior about another merge.

    W = (sum_k c_k W_k G_k + mu W_A)(sum_k c_k G_k + mu I)^-1: the posterior mean of a linear
    regression on each expert's own inputs, under a Gaussian prior about W_A, what the method
    `anchor` gives. Tensors whose inputs are not known stay at W_A. Needs a calibration made with
    `mergewell calibrate --gram`.

    Paper: Li et al. 2026, "BMM / ReForge", arXiv:2605.12843, whose abstract says this much.
    Departures: mu is a fraction of the inputs' mean square, so that one number suits all layers;
    how the paper scales it we have not read. Its search of mu by kind of module on labelled data is
    left to tuning, with a rule of the recipe for each kind. The anchor is made at its defaults.
    """

    paper: ClassVar[str] = "arXiv:2605.12843"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "mu": (0.01, 0.1, 1.0),
        "anchor": ("average", "tsv"),
    }
    needs: ClassVar[Needs] = needs_by(_needs)
    laws: ClassVar[Laws] = Laws(neutral={"anchor": "average"})

    mu: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the prior, as a fraction of the inputs' mean square; 0 is RegMean."""

    anchor: str = "average"
    """The method that gives the prior's mean, such as task_arithmetic, at its defaults."""

    @field_validator("anchor")
    @classmethod
    def _is_another(cls, name: str) -> str:
        if name == cls.component_name():
            raise ValueError("it cannot be its own anchor")
        METHODS.get(name)
        return name

    @property
    def around(self) -> MergeMethod:
        """The anchor's method."""
        return METHODS.build(self.anchor, {}, where="bmm: anchor")

    def for_tensor(self, name: str, *, shape: Sequence[int], guided: bool) -> MergeMethod:
        """Return the method itself for a tensor with known inputs, else the anchor's."""
        return self if guided else self.around.for_tensor(name, shape=shape, guided=False)

    def statistics(self) -> Sequence[WeightStatistic]:
        """Return what the anchor needs."""
        return self.around.statistics()

    def objection(self, coefficients: Sequence[float]) -> str:
        """Refuse what the anchor refuses, and coefficients that are no shares."""
        return not_shares(coefficients) or self.around.objection(coefficients)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the weight nearest to all experts' on their own inputs and to the anchor."""
        inputs, anchor = Inputs.of(group), self.around.merge(group)
        if inputs is None:
            return anchor
        return anchored(group, anchor, inputs, ridge=self.mu * inputs.size)
