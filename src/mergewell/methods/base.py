"""MergeMethod: what one file of this package defines, what it needs and what it promises.

A method is a frozen object with typed fields and one pure function from a tensor group to the
merged tensor. It computes in the dtype it is given and never casts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

from torch import Tensor

from mergewell.component import Component, Family, Fraction, Fractions, Probability, for_each
from mergewell.statistics.base import WeightStatistic
from mergewell.tensor_group import TensorGroup

__all__ = [
    "METHODS",
    "Fraction",
    "Fractions",
    "Laws",
    "MergeMethod",
    "Needs",
    "Probability",
    "TensorGroup",
    "for_each",
    "needs_by",
]

Granularity = Literal["element", "row", "matrix"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What the executor must have at hand."""

    base: bool = False
    """The base's tensors."""

    experts: int | None = None
    """The exact number of experts, where only one number makes sense."""

    granularity: Granularity = "element"
    """The smallest piece on which the method may be run: "row" means whole rows (dimension 0)."""

    calibration: tuple[str, ...] = ()
    """What it reads of a calibration, by family, such as "m_loss"; see `guidance`."""


class _NeedsBy:
    """Needs that follow from a method's parameters; of the class, those at the defaults."""

    def __init__(self, of: Callable[[Any], Needs]) -> None:
        self.of = of

    def __get__(self, method: MergeMethod | None, cls: type[MergeMethod]) -> Needs:
        return self.of(cls() if method is None else method)


def needs_by(of: Callable[[Any], Needs]) -> Needs:
    """Return needs that depend on the method's parameters: write `needs = needs_by(...)`.

    Reading `needs` of a method gives `of(method)`, of its class what the defaults need.
    """
    return cast("Needs", _NeedsBy(of))


@dataclass(frozen=True, slots=True)
class Laws:
    """What a method promises; every law holds by default, a sentence says why one does not.

    The laws themselves, and a broken method for each, stand in `tests/laws.py`.
    """

    order_free: str = ""
    """The order of the experts does not matter."""

    base_if_unmoved: str = ""
    """Experts equal to the base give the base, bitwise."""

    single_expert: str = ""
    """One expert gives itself, bitwise after rounding to the stored dtype."""

    equal_experts: str = ""
    """Equal experts give that expert (to one step of the compute dtype)."""

    translation: str = ""
    """Adding one tensor to all models adds it to the result."""

    scale: str = ""
    """Scaling all models scales the result."""

    sign: str = ""
    """Negating all models negates the result."""

    neutral: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Parameters at which these laws are meant: all of them (such as density 1) for the laws on
    single and equal experts, the choices among them (such as normalize) for the others."""


class MergeMethod(Component):
    """Several tensors to one: the parameters are the fields, the work is `merge`."""

    needs: ClassVar[Needs] = Needs()
    laws: ClassVar[Laws] = Laws()
    paper: ClassVar[str] = ""

    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values worth trying, by parameter; `scale` may be among them only where the merged task
    vector is linear in it, so that one merge serves them all. Empty: the defaults alone."""

    @abstractmethod
    def merge(self, group: TensorGroup) -> Tensor:
        """Return the merged tensor, of the shape and dtype of the experts'."""

    def for_tensor(self, name: str, *, shape: Sequence[int], guided: bool) -> MergeMethod:
        """Return the method for one tensor; `guided` says whether the calibration speaks of it.

        A method that treats some tensors as another method does returns that one: so the plan
        says what each tensor gets.
        """
        del name, shape, guided
        return self

    def statistics(self) -> Sequence[WeightStatistic]:
        """Return the statistics of the weights that have to be made before the merge."""
        return ()

    def objection(self, coefficients: Sequence[float]) -> str:
        """Return what is wrong with these coefficients as the end of a sentence, or nothing."""
        del coefficients
        return ""


METHODS: Family[MergeMethod] = Family("mergewell.methods", MergeMethod, "method")
"""All merge methods, by name."""
