"""What statistics of the weights share: exact order statistics, and sums in one fixed order.

An order statistic comes from histograms of the float bits, never from a sort.
Shapes: S scores (such as one an expert), R ranks asked of each, C chunks of a tensor.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mergewell.statistics.base import State, WeightStatistic
from mergewell.tensor_group import CHUNK, TensorGroup, Value

_FINE = 1 << 16

_SMALL = 1 << 15
"""Elements up to which a sort is faster than histograms; all in one chunk."""

_NOBODY = 0x7FFFFFFF
"""The key of rank 0: no number reaches it."""


def sort_key(tensor: Tensor) -> Tensor:
    """Return x rounded to float32 as int32 that sort as the numbers do; both zeros are 0."""
    bits = (tensor.to(torch.float32) + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def key_value(key: Tensor) -> Tensor:
    """Return the numbers, in float64, that `sort_key` made these keys of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32).to(torch.float64)


def kept_count(density: float, numel: int) -> int:
    """Return how many of `numel` entries a density keeps: floor(density * numel), at least 1."""
    return min(numel, max(1, int(density * numel + 1e-9)))


def chunk_sums(group: TensorGroup, tensors: Sequence[Tensor]) -> Tensor:
    """Return sums in float64 over the fixed chunks of the whole tensor, [C, len(tensors)].

    A block fills the places of its own chunks, so adding blocks up gives the same bits always.
    """
    sums = torch.zeros(-(-group.whole_numel // CHUNK), len(tensors), dtype=torch.float64)
    for column, tensor in enumerate(tensors):
        flat = tensor.flatten().to(torch.float64)
        for start in range(0, flat.numel(), CHUNK):
            sums[(group.offset + start) // CHUNK, column] = flat[start : start + CHUNK].sum()
    return sums


def row_sums(group: TensorGroup, tensors: Sequence[Tensor]) -> State:
    """Return each row's sums in float64 under a key of this block, for methods that get rows.

    Blocks of rows do not begin at chunks; what is added up in one order whatever the blocks is
    rows: `total_of_rows` does it.
    """
    rows = [rows_of(tensor).to(torch.float64).sum(1) for tensor in tensors]
    return {f"{group.name}:rows:{group.offset:020d}": torch.stack(rows, dim=1)}


def total_of_rows(done: State, name: str) -> Tensor:
    """Return the sums over all rows, [len(tensors)], added up in the order of the rows."""
    prefix = f"{name}:rows:"
    return torch.cat([done[key] for key in sorted(done) if key.startswith(prefix)]).sum(0)


def rows_of(tensor: Tensor) -> Tensor:
    """Return a tensor as [rows, length]; a vector or a number is one row."""
    if tensor.dim() < 2:
        return tensor.reshape(1, -1)
    return tensor.flatten(1)


def reached(keys: Tensor, value: Value, row: int, offset: int) -> Tensor:
    """Return where a block's scores are among the highest, as many as the statistic's rank.

    Equal scores at the threshold are taken from the front of the tensor (tensors in the order of
    their names when the threshold is one for the whole model) until the number is reached.
    keys: the block's `sort_key`; row: score * R + rank; offset: of the block in its tensor.
    """
    cut = value["key"][row]
    if "ties_before" not in value:
        return keys >= cut
    tied = keys == cut
    before = value["ties_before"][row, offset // CHUNK]
    position = tied.flatten().cumsum(0).view(tied.shape) + before
    return (keys > cut) | (tied & (position <= value["ties_kept"][row]))


class OrderStatistic(WeightStatistic):
    """The scores that the k-th highest entries have, exactly, for the ks that a subclass asks for.

    A stage takes two passes: the first counts the upper bits of the scores, the second the lower
    bits inside the bucket that holds the k-th. A later stage may score by what an earlier found.
    After the last stage, and only where more entries equal a threshold than may be taken, one pass
    counts these in each chunk, so that exactly k are taken: the first ones by position.
    """

    stages: ClassVar[int] = 1
    signed: ClassVar[bool] = False
    """True where scores may be negative, which doubles the counters of the first pass."""
    cuts_ties: ClassVar[bool] = True
    """False where only the scores are of interest and no mask is made from them."""
    passes: ClassVar[int] = 3

    @abstractmethod
    def scores(self, group: TensorGroup, stage: int, found: Value) -> Sequence[Tensor]:
        """Return S scores of the block's shape; `found` holds the earlier stages' results."""

    @abstractmethod
    def ranks(self, stage: int, counts: Tensor, positive: Tensor) -> Tensor:
        """Return which ranks are wanted, [S, R] from 0 (none) to the number of entries.

        counts, positive: [S], how many entries there are and how many of them score above 0.
        """

    def found(self, done: State, name: str) -> Value:
        """Return what finished stages found, by stage: `key0` [S, R], `key1` ..."""
        owner = self._owner(name)
        keys = {f"key{stage}": done.get(f"{owner}:{stage}:key") for stage in range(self.stages)}
        return {name: key for name, key in keys.items() if key is not None}

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return one block's counts: [S, buckets], [S, R, buckets] or [S * R, C] ties."""
        stage = min(index // 2, self.stages - 1)
        owner = f"{self._owner(group.name)}:{stage}"
        found = self.found(done, group.name)
        keys = [sort_key(score).flatten() for score in self.scores(group, stage, found)]
        if index == 2 * stage:
            lowest = 1 << 15 if self.signed else 0
            counts = [
                torch.bincount((key >> 16) + lowest, minlength=lowest + (1 << 15)) for key in keys
            ]
            positive = [(key > 0).sum() for key in keys]
            return {f"{owner}:coarse": torch.stack(counts), f"{owner}:positive": _stack(positive)}
        if index == 2 * stage + 1:
            buckets = done[f"{owner}:bucket"]
            fine = [
                torch.bincount(key[(key >> 16) == bucket] & 0xFFFF, minlength=_FINE)
                for key, row in zip(keys, buckets, strict=True)
                for bucket in row
            ]
            return {f"{owner}:fine": torch.stack(fine).view(*buckets.shape, _FINE)}
        cut = done[f"{owner}:key"]
        chunks = -(-group.whole_numel // CHUNK)
        ties = torch.zeros(cut.numel(), chunks, dtype=torch.int64)
        for row in range(cut.numel()):
            tied = keys[row // cut.shape[1]] == cut.flatten()[row]
            for start in range(0, tied.numel(), CHUNK):
                ties[row, (group.offset + start) // CHUNK] = tied[start : start + CHUNK].sum()
        return {f"{group.name}:ties": ties}

    def wanted(self, done: State, name: str, index: int) -> bool:
        """Return whether a tensor is read in this pass; ties are counted only where cut."""
        if index == 2 * self.stages:
            owner = f"{self._owner(name)}:{self.stages - 1}"
            return self.cuts_ties and bool(done[f"{owner}:cut_ties"])
        return index < self.passes

    def advance(self, done: State, summed: State, index: int) -> State:
        """Return the state with buckets, thresholds or ties found."""
        result = dict(done)
        for key, counts in summed.items():
            owner, _, what = key.rpartition(":")
            if what == "coarse":
                stage = index // 2
                wanted = self.ranks(stage, counts.sum(1), summed[f"{owner}:positive"])
                rows = counts[:, None].expand(-1, wanted.shape[1], -1)
                bucket, above = _descend(rows, wanted)
                lowest = 1 << 15 if self.signed else 0
                result |= {f"{owner}:bucket": bucket - lowest, f"{owner}:left": wanted - above}
            elif what == "fine":
                fine, above = _descend(counts, done[f"{owner}:left"])
                left = done[f"{owner}:left"] - above
                tied = counts.gather(-1, fine[..., None])[..., 0]
                result[f"{owner}:key"] = ((done[f"{owner}:bucket"] << 16) | fine).to(torch.int32)
                result[f"{owner}:left"] = left
                result[f"{owner}:cut_ties"] = (tied > left).any()
            elif what != "positive":
                result[key] = counts
        return result

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `key` [S * R] and, where ties are cut, `ties_before` [S * R, C], `ties_kept`."""
        del numel
        owner = f"{self._owner(name)}:{self.stages - 1}"
        value = {"key": done[f"{owner}:key"].flatten()}
        if f"{name}:ties" in done:
            ties = done[f"{name}:ties"]
            before = ties.cumsum(1) - ties
            if self.scope == "model":
                for key in sorted(k for k in done if k.endswith(":ties") and k < f"{name}:ties"):
                    before = before + done[key].sum(1, keepdim=True)
            value |= {"ties_before": before, "ties_kept": done[f"{owner}:left"].flatten()}
        return value

    def measure(self, groups: Iterable[TensorGroup]) -> dict[str, Value]:
        """Return the values of whole tensors held in memory, by name; small ones are sorted."""
        held = list(groups)
        if self.scope == "model" or self.stages > 1:
            return super().measure(held)
        values: dict[str, Value] = {}
        for group in held:
            name, numel = group.name, group.whole_numel
            if not 0 < numel <= _SMALL:
                values |= super().measure([group])
                continue
            done: State = {}
            if self.wanted(done, name, 0):
                done = self._sorted(group)
            for index in range(3, self.passes):
                done = self.advance(done, self.update(done, group, index), index)
            values[name] = self.value(done, name, numel)
        return values

    def _sorted(self, group: TensorGroup) -> State:
        """Return the state that the first three passes over a small tensor would leave."""
        keys = torch.stack([sort_key(s).flatten() for s in self.scores(group, 0, {})])
        count = torch.full((len(keys),), keys.shape[1])
        ranks = self.ranks(0, count, (keys > 0).sum(1))
        descending = keys.sort(dim=1, descending=True).values
        found = descending.gather(1, (ranks - 1).clamp(min=0))
        found = torch.where(ranks == 0, _NOBODY, found)
        left = ranks - (keys[:, None] > found[..., None]).sum(-1)
        tied = (keys[:, None] == found[..., None]).sum(-1)
        owner, cut = f"{group.name}:0", (tied > left).any()
        done = {f"{owner}:key": found.to(torch.int32), f"{owner}:left": left}
        if self.cuts_ties and bool(cut):
            done[f"{group.name}:ties"] = tied.reshape(-1, 1)
        return done

    def _owner(self, name: str) -> str:
        return name if self.scope == "tensor" else ""


def _stack(counts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(counts))


def _descend(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest bucket that `wanted` entries from the top reach into, and those above it.

    counts: [S, R, buckets]; wanted: [S, R]; both results: [S, R] int64.
    """
    from_top = counts.flip(-1).cumsum(-1)
    last = counts.shape[-1] - 1
    position = torch.searchsorted(from_top, wanted[..., None])[..., 0].clamp(max=last)
    bucket = last - position
    above = from_top.gather(-1, position[..., None]) - counts.gather(-1, bucket[..., None])
    return bucket, above[..., 0]
