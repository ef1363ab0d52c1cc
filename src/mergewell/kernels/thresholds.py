"""Exact order statistics in about one reading of the weights: guess from a sample, then count.

A few elements are sampled and the wanted ranks guessed from them, with a narrow bracket around each
guess. One pass counts how many entries lie above the bracket and how many equal the guess, and
holds the few others that the bracket has. If the rank falls into the bracket, it is known exactly,
and so are its ties. If it does not, or more are in the bracket than are to be held, two passes
count upper and lower halves of the bits. Of fine-tunes in bfloat16, whose task vectors have few
distinct values, and of most others, one pass is the rule.

Shapes: S scores, R ranks asked of each, C chunks of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergewell.kernels import order_ops
from mergewell.kernels.base import Program, RawBlock
from mergewell.kernels.order_ops import RUN
from mergewell.statistics.base import State
from mergewell.statistics.ops import OrderStatistic
from mergewell.tensor_group import CHUNK, Value

_SAMPLE = (1 << 15, 1 << 19)
"""Least and most elements of a large tensor that are sampled, about."""

_SPARSE = 16
"""A sample is at most this part of a tensor."""

_FINE = 256
"""A sample is this part of a very large tensor: of less, brackets hold more than there is room."""

_COARSE = 1024
"""A sample is this part of a whole model."""

_DEVIATIONS = 6.0
"""Half the width of a bracket, in deviations that independent draws would have: so many, since
neighbours are alike."""

_HELD = 1 << 21
"""Entries beside a guess that are held, of all that one score ranks."""

_GUESS, _COUNT, _UPPER, _LOWER, _TIES = range(5)

_TOP = 1 << 31
"""Above all keys."""

_NOBODY = 0x7FFFFFFF
"""The key that rank 0 has: no number reaches it."""


@dataclass(slots=True)
class _Row:
    """One rank of one score: what is known of its key."""

    score: int
    rank: int
    low: int = 0
    guess: int = 0
    top: int = _TOP
    """The bracket [low, top) around the guess."""
    upper: int = -1
    """The upper bits of the key, once they were counted; the rank is that among these then."""
    key: int = -1
    """Found, or -1."""
    left: int = 0
    """How many entries at the key are taken."""
    equal: int = 0
    """How many there are."""
    ties_known: int = 0
    """Whether they were counted chunk by chunk."""

    @property
    def cuts(self) -> bool:
        return self.key >= 0 and self.equal > self.left

    def found(self, key: int, left: int, equal: int) -> None:
        self.key, self.left, self.equal = key, left, equal


@dataclass(frozen=True, slots=True)
class _Held:
    """The entries of a bracket beside its guess: their keys and chunks, and how many there were."""

    name: str
    keys: NDArray[np.int32]
    chunks: NDArray[np.int32]


class OrderProgram(Program):
    """The k-th highest scores by guessing and counting; see `statistics.ops.OrderStatistic`."""

    statistic: OrderStatistic

    passes = _TIES + 1

    def __init__(self, statistic: OrderStatistic, *, variance: bool = False) -> None:
        """Rank the magnitudes of the task vectors, or else the variance over the experts."""
        super().__init__(statistic)
        self._variance = variance

    def scores(self, block: RawBlock) -> tuple[int, ...]:
        """Return the scores to rank, by their numbers in `order_ops`."""
        experts = len(block.experts)
        return (experts,) if self._variance else tuple(range(experts))

    def wanted(self, done: State, name: str, index: int) -> bool:
        """Return whether a tensor is read in this pass: only while its ranks are open."""
        if index == _GUESS:
            return True
        rows = _rows(done, self._owner(name))
        if index < _TIES:
            return any(row.key < 0 for row in rows)
        return self.statistic.cuts_ties and any(row.cuts and not row.ties_known for row in rows)

    def update(self, done: State, block: RawBlock, index: int) -> State:
        """Return a block's sample, what its brackets hold, a histogram, or its ties by chunk."""
        owner = self._owner(block.name)
        if index == _GUESS:
            return self._sampled(block, owner)
        rows = _rows(done, owner)
        if index == _COUNT:
            return self._counted(block, owner, rows, int(done[f"{owner}:numel"]))
        if index == _TIES:
            return {f"{block.name}:ties": self._ties(block, rows)}
        assert block.base is not None
        open_rows = [row for row in rows if row.key < 0]
        counts = np.zeros((len(open_rows), 1 << 16), np.int64)
        order_ops.histogram(
            block.base, block.addresses, self._scores_of(block, open_rows),
            np.array([row.upper for row in open_rows]), counts, block.coefficients,
        )  # fmt: skip
        return {f"{owner}:histogram": torch.from_numpy(counts)}

    def advance(self, done: State, summed: State, index: int) -> State:
        """Return the state with guesses, keys, halves of keys, or ties found."""
        result = dict(done)
        if index == _GUESS:
            for key in [key for key in summed if key.endswith(":numel")]:
                owner = key.removesuffix(":numel")
                result[key] = summed[key]
                result[f"{owner}:rows"] = _packed(self._guessed(summed, owner))
        elif index == _COUNT:
            for key in [key for key in summed if key.endswith(":above")]:
                self._look_into_brackets(result, summed, key.removesuffix(":above"))
        elif index == _TIES:
            for key, ties in summed.items():
                result[key] = result[key] + ties if key in result else ties
        else:
            for key, counts in summed.items():
                owner = key.removesuffix(":histogram")
                rows = _rows(done, owner)
                open_rows = [row for row in rows if row.key < 0]
                for row, found in zip(open_rows, counts.numpy(), strict=True):
                    _halve(row, found)
                result[f"{owner}:rows"] = _packed(rows)
        return result

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `key` [S * R] and, where ties are cut, `ties_before` [S * R, C], `ties_kept`."""
        del numel
        rows = _rows(done, self._owner(name))
        value = {"key": torch.tensor([row.key for row in rows], dtype=torch.int32)}
        if not self.statistic.cuts_ties or not any(row.cuts for row in rows):
            return value
        ties = done[f"{name}:ties"]
        before = ties.cumsum(1) - ties
        if self.statistic.scope == "model":
            for key in sorted(k for k in done if k.endswith(":ties") and k < f"{name}:ties"):
                before = before + done[key].sum(1, keepdim=True)
        return value | {"ties_before": before, "ties_kept": torch.tensor([r.left for r in rows])}

    def _owner(self, name: str) -> str:
        return name if self.statistic.scope == "tensor" else ""

    def _scores_of(self, block: RawBlock, rows: Sequence[_Row]) -> NDArray[np.int64]:
        scores = self.scores(block)
        return np.array([scores[row.score] for row in rows])

    def _sampled(self, block: RawBlock, owner: str) -> State:
        assert block.base is not None
        stride = _COARSE
        if self.statistic.scope == "tensor":
            least, most = _SAMPLE
            size = min(max(block.numel // _FINE, least), most)
            stride = max(_SPARSE, block.numel // size)
        scores = np.array(self.scores(block))
        keys = np.empty((len(scores), -(-block.base.size // (stride * RUN)) * RUN), np.int32)
        filled = order_ops.sample(
            block.base, block.addresses, scores, stride * RUN, block.coefficients, keys
        )
        place = f"{owner}:sample:{block.name}:{block.offset:020d}"
        return {
            f"{owner}:numel": torch.tensor(block.base.size),
            place: torch.from_numpy(keys[:, :filled]),
        }

    def _guessed(self, summed: State, owner: str) -> list[_Row]:
        prefix = f"{owner}:sample:"
        parts = [summed[key] for key in sorted(summed) if key.startswith(prefix)]
        keys = np.sort(torch.cat(parts, dim=1).numpy(), axis=1)
        numel, size = int(summed[f"{owner}:numel"]), keys.shape[1]
        positive = torch.from_numpy((keys > 0).sum(1)) * numel // size
        ranks = self.statistic.ranks(0, torch.full((len(keys),), numel), positive)
        rows: list[_Row] = []
        for score, asked in enumerate(cast("list[list[int]]", ranks.tolist())):
            for rank in asked:
                share = min(rank / numel, 1.0)
                margin = 2 + _DEVIATIONS * math.sqrt(size * share * (1 - share))
                places = [share * size + margin, share * size, math.floor(share * size - margin)]
                inside = [min(max(size - 1 - int(place), 0), size - 1) for place in places]
                low, guess, high = (int(keys[score, place]) for place in inside)
                row = _Row(score, rank, low if places[0] < size else 0, guess)
                row.top = high + 1 if places[2] >= 0 else _TOP
                row.key = _NOBODY if rank == 0 else -1
                rows.append(row)
        return rows

    def _counted(self, block: RawBlock, owner: str, rows: list[_Row], numel: int) -> State:
        assert block.base is not None
        open_rows = [row for row in rows if row.key < 0]
        size = len(open_rows)
        room = 1 + block.base.size * min(numel // 4, _HELD) // numel
        held, filled = np.empty((size, 2, room), np.int32), np.zeros(size, np.int64)
        tied = np.zeros((size, -(-block.numel // CHUNK)), np.int64)
        above, positive = np.zeros(size, np.int64), np.zeros(size, np.int64)
        order_ops.count(
            block.base, block.addresses, self._scores_of(block, open_rows),
            np.array([[row.low, row.guess, row.top] for row in open_rows]), CHUNK, block.offset,
            tied, above, positive, held, filled, block.coefficients,
        )  # fmt: skip
        state = {
            f"{owner}:above": torch.from_numpy(above),
            f"{owner}:positive": torch.from_numpy(positive),
            f"{owner}:inside": torch.from_numpy(filled),
            f"{block.name}:tied": torch.from_numpy(tied),
        }
        for place, count in enumerate(np.minimum(filled, room).tolist()):
            if count:  # a copy: what has room for more is not kept
                part = torch.from_numpy(held[place, :, :count].copy())
                state[f"{block.name}:held:{place}:{block.offset:020d}"] = part
        return state

    def _look_into_brackets(self, result: dict[str, Tensor], summed: State, owner: str) -> None:
        """Find the keys of one owner's rows, and their ties by chunk, where brackets have them."""
        rows = _rows(result, owner)
        if self._variance:
            numel = result[f"{owner}:numel"].reshape(1)
            ranks = self.statistic.ranks(0, numel, summed[f"{owner}:positive"]).flatten()
            for row, rank in zip(rows, cast("list[int]", ranks.tolist()), strict=True):
                row.rank = rank
        suffix = ":tied"
        names = [key.removesuffix(suffix) for key in summed if key.endswith(suffix)]
        names = [name for name in names if self._owner(name) == owner]
        tied = {name: summed[name + suffix] for name in names}
        ties = {name: part.new_zeros(len(rows), part.shape[1]) for name, part in tied.items()}
        for place, i in enumerate(i for i, row in enumerate(rows) if row.key < 0):
            row = rows[i]
            held = [part for name in names for part in _held(summed, name, place)]
            kept = sum(part.keys.size for part in held)
            if row.rank == 0:
                row.key = _NOBODY
            elif kept == int(summed[f"{owner}:inside"][place]):
                equal = int(sum(int(part[place].sum()) for part in tied.values()))
                _look(row, int(summed[f"{owner}:above"][place]), equal, held)
            if row.key == row.guess:
                for name in names:
                    ties[name][i] = tied[name][place]
            for part in held:
                at = part.chunks[part.keys == row.key]
                counts = np.bincount(at, minlength=ties[part.name].shape[1])
                ties[part.name][i] += torch.from_numpy(counts)
            row.ties_known = int(row.key >= 0)
        result[f"{owner}:rows"] = _packed(rows)
        result |= {f"{name}:ties": part for name, part in ties.items()}

    def _ties(self, block: RawBlock, rows: list[_Row]) -> Tensor:
        assert block.base is not None
        first = block.offset // CHUNK
        tied = np.zeros((len(rows), -(-block.numel // CHUNK)), np.int64)
        wanted = [row.key if row.cuts and not row.ties_known else -1 for row in rows]
        order_ops.count_ties(
            block.base, block.addresses, self._scores_of(block, rows),
            np.array(wanted), CHUNK, tied[:, first:], block.coefficients,
        )  # fmt: skip
        return torch.from_numpy(tied)


def _look(row: _Row, above: int, tied: int, held: Sequence[_Held]) -> None:
    """Find the key of a row in its bracket, all of which is known, if it is there."""
    keys = np.sort(np.concatenate([*(part.keys for part in held), np.empty(0, np.int32)]))
    higher = len(keys) - int(np.searchsorted(keys, row.guess))
    rank = row.rank - above  # within the bracket
    if not 0 < rank <= len(keys) + tied:
        return
    if higher < rank <= higher + tied:
        row.found(row.guess, rank - higher, tied)
        return
    key = int(keys[len(keys) - (rank if rank <= higher else rank - tied)])
    first, last = (int(np.searchsorted(keys, key, side)) for side in ("left", "right"))
    before = len(keys) - last + (tied if key < row.guess else 0)
    row.found(key, rank - before, last - first)


def _halve(row: _Row, counts: NDArray[np.int64]) -> None:
    """Find the upper bits of a row's key, or then the lower ones, in a histogram of them."""
    reached = np.cumsum(counts[::-1])
    at = int(np.searchsorted(reached, row.rank))
    half = len(counts) - 1 - at
    row.rank -= int(reached[at] - counts[half])
    if row.upper < 0:
        row.upper = half
    else:
        row.found(row.upper << 16 | half, row.rank, int(counts[half]))


def _held(summed: State, name: str, place: int) -> list[_Held]:
    prefix = f"{name}:held:{place}:"
    parts = [summed[key].numpy() for key in sorted(summed) if key.startswith(prefix)]
    return [_Held(name, keys, chunks) for keys, chunks in parts]


_FIELDS = tuple(_Row.__dataclass_fields__)


def _packed(rows: list[_Row]) -> Tensor:
    return torch.tensor([[getattr(row, field) for field in _FIELDS] for row in rows])


def _rows(done: Mapping[str, Tensor], owner: str) -> list[_Row]:
    return [_Row(*row) for row in cast("list[list[int]]", done[f"{owner}:rows"].tolist())]
