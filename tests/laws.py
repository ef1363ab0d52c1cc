"""The laws that every merge method is held to, each a sentence, and a broken method for each.

A law is a function of a method that raises AssertionError where the method breaks it. Methods opt
out of a law only by a sentence in their `laws`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup

SHAPES = [(), (1,), (0,), (7,), (5, 3), (4, 1, 6), (2, 3, 2, 2)]
DTYPES = [torch.float32, torch.float64]


def group_of(
    method: MergeMethod,
    shape: tuple[int, ...] = (5, 3),
    *,
    experts: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TensorGroup:
    """Return a random group that the method can take, with small changes as fine-tunes have."""
    generator = torch.Generator().manual_seed(seed)
    count = method.needs.experts or experts
    base = torch.randn(shape, generator=generator).to(dtype)
    moved = tuple(
        base + (0.1 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)
    )
    return TensorGroup(
        name="layer.weight",
        experts=moved,
        coefficients=torch.ones(count, dtype=dtype),
        base=base,
    )


def close(left: Tensor, right: Tensor, *, of: Tensor) -> bool:
    """Return whether two tensors agree to a few steps of the compute dtype at the size of `of`."""
    step = torch.finfo(left.dtype).eps * 32
    size = float(of.abs().max()) if of.numel() else 1.0
    return bool((left - right).abs().max() <= step * max(size, 1e-6)) if left.numel() else True


def neutral(method: MergeMethod) -> MergeMethod:
    """Return the method at the parameters where the laws on single and equal experts are meant."""
    return type(method).model_validate({**method.parameters(), **method.laws.neutral})


def chosen(method: MergeMethod) -> MergeMethod:
    """Return the method with the choices, but not the numbers, that the laws are meant at."""
    choices = {k: v for k, v in method.laws.neutral.items() if isinstance(v, bool | str)}
    return type(method).model_validate({**method.parameters(), **choices})


# --- laws without an exception ------------------------------------------------------------------


def keeps_shape_and_dtype(method: MergeMethod) -> None:
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        group = group_of(method, shape, dtype=dtype)
        merged = method.merge(group)
        assert (merged.shape, merged.dtype) == (torch.Size(shape), dtype)


def stays_finite(method: MergeMethod) -> None:
    for shape in SHAPES:
        group = group_of(method, shape)
        zero = torch.zeros(shape)
        assert torch.isfinite(method.merge(group)).all()
        still = replace(group, experts=tuple(zero for _ in group.experts), base=zero)
        assert torch.isfinite(method.merge(still)).all(), "all zeros"


def leaves_its_inputs_alone(method: MergeMethod) -> None:
    group = group_of(method)
    assert group.base is not None
    before = [tensor.clone() for tensor in (*group.experts, group.base, group.coefficients)]
    method.merge(group)
    after = (*group.experts, group.base, group.coefficients)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def repeats_itself(method: MergeMethod) -> None:
    torch.manual_seed(1)
    first = method.merge(group_of(method))
    torch.manual_seed(2)
    assert torch.equal(first, method.merge(group_of(method)))


def can_be_cut_into_blocks(method: MergeMethod) -> None:
    whole = group_of(method, (6, 5))
    merged = method.merge(whole)
    if method.needs.granularity == "matrix":
        return
    assert whole.base is not None
    size = 5 if method.needs.granularity == "row" else 7
    # as the executor does: blocks of elements are flat, blocks of rows keep their shape
    seen = whole if method.needs.granularity == "row" else flat_group(whole)
    values = {statistic: statistic.measure([seen])[whole.name] for statistic in method.statistics()}
    parts: list[Tensor] = []
    for start in range(0, 30, size):
        cut = slice(start, start + size)
        shape = (-1, 5) if method.needs.granularity == "row" else (-1,)
        parts.append(
            method.merge(
                replace(
                    whole,
                    experts=tuple(e.flatten()[cut].view(shape) for e in whole.experts),
                    base=whole.base.flatten()[cut].view(shape),
                    offset=start,
                    numel=30,
                    statistics=values,
                )
            ).flatten()
        )
    assert torch.equal(torch.cat(parts), merged.flatten())


def flat_group(group: TensorGroup) -> TensorGroup:
    assert group.base is not None
    return replace(
        group, experts=tuple(e.flatten() for e in group.experts), base=group.base.flatten()
    )


def is_documented(method: MergeMethod) -> None:
    text = type(method).__doc__ or ""
    assert method.paper, "no paper"
    assert "Paper:" in text and "Departures:" in text
    assert len(method.summary()) <= 88 and method.summary().endswith(".")
    for name, info in type(method).model_fields.items():
        assert info.description, f"{name} has no docstring"


# --- laws that hold unless a sentence says why not ----------------------------------------------


def order_free(method: MergeMethod) -> None:
    method = chosen(method)
    group = group_of(method)
    merged = method.merge(group)
    turned = replace(group, experts=group.experts[::-1], coefficients=group.coefficients.flip(0))
    assert close(merged, method.merge(turned), of=group.experts[0])


def base_if_unmoved(method: MergeMethod) -> None:
    if not method.needs.base:
        return
    group = group_of(method)
    assert group.base is not None
    still = replace(group, experts=tuple(group.base.clone() for _ in group.experts))
    assert torch.equal(method.merge(still), group.base)


def single_expert(method: MergeMethod) -> None:
    stored = torch.bfloat16
    for dtype, stored in [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)]:
        group = group_of(neutral(method), (40, 30), experts=1, dtype=dtype)
        assert group.base is not None
        one = replace(
            group,
            experts=tuple(e.to(stored).to(dtype) for e in group.experts),
            base=group.base.to(stored).to(dtype),
        )
        assert torch.equal(neutral(method).merge(one).to(stored), one.experts[0].to(stored))


def equal_experts(method: MergeMethod) -> None:
    group = group_of(neutral(method))
    same = replace(group, experts=tuple(group.experts[0].clone() for _ in group.experts))
    assert close(neutral(method).merge(same), group.experts[0], of=group.experts[0])


def translation(method: MergeMethod) -> None:
    method = chosen(method)
    group = group_of(method, (6, 4), dtype=torch.float64)
    assert group.base is not None
    # a power-of-two grid keeps the task vectors bitwise the same, so that no draw is decided anew
    grid = [torch.round(t * 1024) / 1024 for t in (*group.experts, group.base)]
    group = replace(group, experts=tuple(grid[:-1]), base=grid[-1])
    moved = replace(group, experts=tuple(t + 2.0 for t in grid[:-1]), base=grid[-1] + 2.0)
    assert close(method.merge(moved), method.merge(group) + 2.0, of=grid[0] + 2.0)


def scale(method: MergeMethod) -> None:
    method = chosen(method)
    group = group_of(method, (6, 4))
    assert group.base is not None
    scaled = replace(group, experts=tuple(4 * e for e in group.experts), base=4 * group.base)
    assert close(method.merge(scaled), 4 * method.merge(group), of=scaled.experts[0])


def sign(method: MergeMethod) -> None:
    method = chosen(method)
    group = group_of(method, (6, 4))
    assert group.base is not None
    negated = replace(group, experts=tuple(-e for e in group.experts), base=-group.base)
    assert close(method.merge(negated), -method.merge(group), of=group.experts[0])


Law = Callable[[MergeMethod], None]

ALWAYS: tuple[Law, ...] = (
    keeps_shape_and_dtype,
    stays_finite,
    leaves_its_inputs_alone,
    repeats_itself,
    can_be_cut_into_blocks,
    is_documented,
)
UNLESS_SAID: tuple[Law, ...] = (
    order_free,
    base_if_unmoved,
    single_expert,
    equal_experts,
    translation,
    scale,
    sign,
)


# --- a broken method for each law ---------------------------------------------------------------


@dataclass(frozen=True)
class Breaker:
    """A method that must fail one law."""

    law: Law
    method: MergeMethod


class _Broken(MergeMethod):
    """Paper: none. Departures: all."""

    needs: ClassVar[Needs] = Needs(base=True)
    paper: ClassVar[str] = "none"

    def mean(self, group: TensorGroup) -> Tensor:
        return torch.stack(group.experts).mean(0)


class FlatShape(_Broken):
    def merge(self, group: TensorGroup) -> Tensor:
        return self.mean(group).flatten()


class WrongDtype(_Broken):
    def merge(self, group: TensorGroup) -> Tensor:
        return self.mean(group).to(torch.float16)


class DividesByNorm(_Broken):
    def merge(self, group: TensorGroup) -> Tensor:
        return self.mean(group) / self.mean(group).abs().sum()


class WritesIntoExpert(_Broken):
    def merge(self, group: TensorGroup) -> Tensor:
        return group.experts[0].mul_(0.5)


class GlobalRandom(_Broken):
    def merge(self, group: TensorGroup) -> Tensor:
        return self.mean(group) + torch.randn_like(group.experts[0])


class BlockMaximum(_Broken):
    def merge(self, group: TensorGroup) -> Tensor:
        mean = self.mean(group)
        return mean / mean.abs().max().clamp(min=1.0) if mean.numel() else mean


class Undocumented(_Broken):
    def merge(self, group: TensorGroup) -> Tensor:
        return self.mean(group)


class FirstWins(_Broken):
    def merge(self, group: TensorGroup) -> Tensor:
        return group.experts[0] * 0.9 + self.mean(group) * 0.1


class Shrinks(_Broken):
    def merge(self, group: TensorGroup) -> Tensor:
        return self.mean(group) * 0.5


class Squares(_Broken):
    def merge(self, group: TensorGroup) -> Tensor:
        return self.mean(group) ** 2


class Magnitude(_Broken):
    def merge(self, group: TensorGroup) -> Tensor:
        return self.mean(group).abs()


BREAKERS: tuple[Breaker, ...] = (
    Breaker(keeps_shape_and_dtype, FlatShape()),
    Breaker(keeps_shape_and_dtype, WrongDtype()),
    Breaker(stays_finite, DividesByNorm()),
    Breaker(leaves_its_inputs_alone, WritesIntoExpert()),
    Breaker(repeats_itself, GlobalRandom()),
    Breaker(can_be_cut_into_blocks, BlockMaximum()),
    Breaker(is_documented, Undocumented()),
    Breaker(order_free, FirstWins()),
    Breaker(base_if_unmoved, Shrinks()),
    Breaker(single_expert, Shrinks()),
    Breaker(equal_experts, Shrinks()),
    Breaker(translation, Shrinks()),
    Breaker(scale, Squares()),
    Breaker(sign, Magnitude()),
)

OPT_OUTS = frozenset(law.__name__ for law in UNLESS_SAID)
assert set(Laws.__dataclass_fields__) - {"neutral"} == OPT_OUTS
