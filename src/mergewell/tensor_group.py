"""TensorGroup: the same tensor (or the same block of it) of every model, as a method sees it.

Shapes: K experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergewell.errors import MethodError

if TYPE_CHECKING:
    from mergewell.statistics.base import WeightStatistic

CHUNK = 65_536
"""Elements of the unit of work: blocks begin at multiples of it, partial sums are made over it."""

Value = Mapping[str, Tensor]
"""What a statistic gives for one tensor group, by the statistic's own names."""


@dataclass(frozen=True)
class TensorGroup:
    """One tensor, or one block of it, of every model, in the compute dtype.

    The compute dtype is float32 for 16-bit (and narrower) checkpoints and float64 for float32 and
    float64 ones, so that an expert minus its base plus its base is that expert again.
    """

    name: str
    """The tensor's name in the checkpoint."""

    experts: tuple[Tensor, ...]
    """K tensors of one shape and dtype."""

    coefficients: Tensor
    """Coefficients of the experts, [K]."""

    base: Tensor | None = None
    """The same tensor of the base, if the recipe has one."""

    seed: int = 0
    """The recipe's seed."""

    offset: int = 0
    """Position of the first element in the whole, flattened tensor."""

    numel: int = -1
    """Elements of the whole tensor; -1 when this group is the whole."""

    statistics: Mapping[WeightStatistic, Value] = field(
        default_factory=dict["WeightStatistic", Value]
    )
    """Values made by earlier passes, by the statistic that made them."""

    calibration: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What a calibration says of these rows, as the method's needs ask; see `guidance`."""

    @property
    def is_whole(self) -> bool:
        """True when this is a whole tensor and not a block of one."""
        return self.numel in (-1, self.experts[0].numel())

    @property
    def whole_numel(self) -> int:
        """Number of elements of the whole tensor."""
        return self.experts[0].numel() if self.numel == -1 else self.numel

    @cached_property
    def task_vectors(self) -> tuple[Tensor, ...]:
        """K task vectors, expert minus base.

        Raises:
            MethodError: the group has no base.
        """
        return tuple(expert - self.required_base for expert in self.experts)

    @property
    def required_base(self) -> Tensor:
        """The base's tensor.

        Raises:
            MethodError: the group has no base although the method declared that it needs one.
        """
        if self.base is None:
            raise MethodError(f"{self.name}: a base is needed but the group has none.")
        return self.base

    def statistic(self, statistic: WeightStatistic) -> Value:
        """Return a statistic's value: from an earlier pass, or made now from a whole tensor.

        Raises:
            MethodError: the value was not made and cannot be made from a block.
        """
        if statistic in self.statistics:
            return self.statistics[statistic]
        if statistic.scope == "model" or not self.is_whole:
            raise MethodError(
                f"{self.name}: {statistic.component_name()} was not made before the merge; "
                "the method must name it in `statistics`."
            )
        return statistic.measure([self])[self.name]

    def uniform(self, expert: int) -> Tensor:
        """Return uniform random numbers in [0, 1) of the tensors' shape.

        They depend on (seed, tensor name, expert, position in the whole tensor) alone, hence not
        on blocks, threads, devices or the order of visit. Source: SplitMix64, Steele et al. 2014;
        each of its 64-bit numbers serves two positions, the lower half the even one.
        """
        like = self.experts[expert]
        key = random_key(self.seed, self.name, expert)
        start, stop = self.offset, self.offset + like.numel()
        pairs = torch.arange((start >> 1) + 1, ((stop + 1) >> 1) + 1, device=like.device)
        bits = _split_mix_64(pairs, key)
        halves = torch.stack([bits, bits >> 32], dim=1).flatten()[start & 1 :][: stop - start]
        return ((halves >> 8) & 0xFFFFFF).to(like.dtype).reshape(like.shape) / float(1 << 24)


def random_key(seed: int, name: str, expert: int) -> int:
    """Return the 64-bit key of one expert's random numbers in one tensor."""
    digest = hashlib.blake2b(f"{seed}/{expert}/{name}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _split_mix_64(index: Tensor, key: int) -> Tensor:
    """Hash int64 positions to int64 bits; multiplication wraps around, shifts are logical."""
    z = index * -7046029254386353131 + key  # 0x9E3779B97F4A7C15
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ ((z >> 31) & 0x1FFFFFFFF)
