"""Exact k-th largest magnitudes of task vectors from histograms of the float bits; never a sort.

Shapes: K experts, C chunks of a tensor.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mergewell.component import Fractions, for_each
from mergewell.statistics.base import State, WeightStatistic
from mergewell.tensor_group import CHUNK, TensorGroup, Value

_COARSE = 1 << 15  # sign bit is 0: 15 bits of exponent and leading mantissa
_FINE = 1 << 16


def magnitude_key(tensor: Tensor) -> Tensor:
    """Return |x| rounded to float32 as int32 bits, which sort as the magnitudes do."""
    return tensor.abs().to(torch.float32).view(torch.int32)


def kept_count(density: float, numel: int) -> int:
    """Return how many of `numel` entries a density keeps: floor(density * numel), at least 1."""
    return min(numel, max(1, int(density * numel + 1e-9)))


class MagnitudeThreshold(WeightStatistic):
    """The magnitude that the k largest entries of each task vector reach, k = density x size.

    Pass 0 counts the upper bits, pass 1 the lower bits inside the bucket that holds the k-th,
    pass 2 (only where more entries equal the threshold than may be kept) counts those per chunk,
    so that exactly k are kept: the first ones by position.

    Departures: k = floor(density * size) but at least 1, where mergekit refuses 0.
    """

    passes: ClassVar[int] = 3

    density: Fractions
    """Fraction of the entries to keep, of all experts or of each."""

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return the counts of one block: [K, buckets] or, in the last pass, [K, C] ties."""
        owner = self._owner(group.name)
        keys = [magnitude_key(tau).flatten() for tau in group.task_vectors]
        if index == 0:
            counts = [torch.bincount(key >> 16, minlength=_COARSE) for key in keys]
            return {f"{owner}:coarse": torch.stack(counts)}
        if index == 1:
            buckets = done[f"{owner}:bucket"]
            inside = [key[(key >> 16) == bucket] for key, bucket in zip(keys, buckets, strict=True)]
            counts = [torch.bincount(key & 0xFFFF, minlength=_FINE) for key in inside]
            return {f"{owner}:fine": torch.stack(counts)}
        chunks = -(-group.whole_numel // CHUNK)
        ties = torch.zeros(len(keys), chunks, dtype=torch.int64)
        for expert, key in enumerate(keys):
            tied = key == done[f"{owner}:key"][expert]
            for start in range(0, tied.numel(), CHUNK):
                ties[expert, (group.offset + start) // CHUNK] = tied[start : start + CHUNK].sum()
        return {f"{group.name}:ties": ties}

    def wanted(self, done: State, name: str, index: int) -> bool:
        """Return whether a tensor is read in this pass; the last is for cut ties only."""
        return index < 2 or bool(done[f"{self._owner(name)}:cut_ties"])

    def advance(self, done: State, summed: State, index: int) -> State:
        """Return the state with the bucket (pass 0), the threshold (1) or the ties (2) found."""
        result = dict(done)
        for key, counts in summed.items():
            owner, _, what = key.rpartition(":")
            if what == "coarse":
                wanted = self._wanted_counts(int(counts[0].sum()), len(counts))
                bucket, above = _descend(counts, wanted)
                result |= {f"{owner}:bucket": bucket, f"{owner}:left": wanted - above}
            elif what == "fine":
                fine, above = _descend(counts, done[f"{owner}:left"])
                left = done[f"{owner}:left"] - above
                tied = counts.gather(1, fine[:, None])[:, 0]
                result[f"{owner}:key"] = ((done[f"{owner}:bucket"] << 16) | fine).to(torch.int32)
                result[f"{owner}:left"] = left
                result[f"{owner}:cut_ties"] = (tied > left).any()
            else:
                result[key] = counts
        return result

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `key` [K] and, where ties are cut, `ties_before` [K, C] and `ties_kept` [K]."""
        del numel
        owner = self._owner(name)
        value = {"key": done[f"{owner}:key"]}
        if f"{name}:ties" in done:
            ties = done[f"{name}:ties"]
            before = ties.cumsum(1) - ties
            if self.scope == "model":
                for key in sorted(k for k in done if k.endswith(":ties") and k < f"{name}:ties"):
                    before = before + done[key].sum(1, keepdim=True)
            value |= {"ties_before": before, "ties_kept": done[f"{owner}:left"]}
        return value

    def _owner(self, name: str) -> str:
        return name if self.scope == "tensor" else ""

    def _wanted_counts(self, numel: int, experts: int) -> Tensor:
        densities = for_each(self.density, experts)
        return torch.tensor([kept_count(density, numel) for density in densities])


def _descend(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest bucket that `wanted` entries from the top reach into, and those above it.

    counts: [K, buckets]; wanted: [K]; both results: [K] int64.
    """
    from_top = counts.flip(1).cumsum(1)
    position = torch.searchsorted(from_top, wanted[:, None])[:, 0].clamp(max=counts.shape[1] - 1)
    bucket = counts.shape[1] - 1 - position
    above = from_top.gather(1, position[:, None])[:, 0] - counts.gather(1, bucket[:, None])[:, 0]
    return bucket, above
