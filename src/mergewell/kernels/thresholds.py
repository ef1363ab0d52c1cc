"""Exact order statistics in about one reading of the weights: guess from a sample, then count.

A few elements are sampled and the wanted ranks guessed from them. One pass counts how many entries
lie above a narrow bracket around each guess, how many equal the guess, and the rest of the bracket
in buckets. If the rank falls on the guess, or on a bucket whose keys are all the same, it is known
exactly; if not, the bucket (or what lies beside the bracket) is the next bracket. Never more than
five passes of counting; of fine-tunes in bfloat16, whose task vectors have few distinct values,
one is the rule.

Shapes: S scores, R ranks asked of each, C chunks of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergewell.kernels import order_ops
from mergewell.kernels.base import Program, RawBlock
from mergewell.kernels.order_ops import BUCKETS, RUN
from mergewell.statistics.base import State
from mergewell.statistics.ops import OrderStatistic
from mergewell.tensor_group import CHUNK, Value

_SAMPLE = 1 << 15
"""Elements of a large tensor that are sampled, about."""

_SPARSE = 16
"""A sample is at most this part of a tensor."""

_MARGIN = 3.0
"""Half the width of a bracket in units of sqrt(size of the sample): six deviations and more of what
independent draws would do, since neighbours are alike."""

_COUNTING = 5
"""Passes of counting: a miss leaves 2^31 keys, and each further one a 2048th of them."""

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
    guess: int = -1
    top: int = _TOP
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

    def bracket(self) -> NDArray[np.int64]:
        guess = self.guess if self.guess >= 0 else self.low - 1
        return np.array(
            [self.low, guess, self.top, _shift(guess - self.low), _shift(self.top - guess - 1)]
        )


class OrderProgram(Program):
    """The k-th highest scores by guessing and counting; see `statistics.ops.OrderStatistic`."""

    statistic: OrderStatistic

    passes = 1 + _COUNTING + 1

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
        if index == 0:
            return True
        rows = _rows(done, self._owner(name))
        if index <= _COUNTING:
            return any(row.key < 0 for row in rows)
        return self.statistic.cuts_ties and any(row.cuts and not row.ties_known for row in rows)

    def update(self, done: State, block: RawBlock, index: int) -> State:
        """Return a block's sample, its counts within the brackets, or its ties by chunk."""
        owner = self._owner(block.name)
        if index == 0:
            return self._sampled(block, owner)
        rows = _rows(done, owner)
        if index <= _COUNTING:
            return self._counted(block, owner, rows)
        return {f"{block.name}:ties": self._ties(block, rows)}

    def advance(self, done: State, summed: State, index: int) -> State:
        """Return the state with guesses, narrower brackets, keys or ties found."""
        result = dict(done)
        if index == 0:
            for key in [key for key in summed if key.endswith(":numel")]:
                owner = key.removesuffix(":numel")
                result[f"{owner}:rows"] = _packed(self._guessed(summed, owner))
            return result
        if index > _COUNTING:
            for key, ties in summed.items():
                result[key] = result[key] + ties if key in result else ties
            return result
        for key in [key for key in summed if key.endswith(":above")]:
            owner = key.removesuffix(":above")
            rows = _rows(done, owner)
            if self._variance and index == 1:
                self._rank(rows, int(summed[f"{owner}:numel"]), summed[f"{owner}:positive"])
            open_rows = [i for i, row in enumerate(rows) if row.key < 0]
            tied = self._tied_at_guess(summed, owner)
            for place, i in enumerate(open_rows):
                above, equal = int(summed[key][place]), int(tied[place])
                _narrow(rows[i], above, equal, summed[f"{owner}:counts"][place])
            result[f"{owner}:rows"] = _packed(rows)
            for name in [name for name in summed if name.endswith(":tied")]:
                if self._owner(name.removesuffix(":tied")) == owner:
                    self._keep_ties(result, name, rows, open_rows, summed[name])
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

    def _sampled(self, block: RawBlock, owner: str) -> State:
        assert block.base is not None
        whole = self.statistic.scope == "tensor"
        stride = max(_SPARSE, block.numel // _SAMPLE if whole else 1024) * RUN
        scores = np.array(self.scores(block))
        keys = np.empty((len(scores), -(-block.base.size // stride) * RUN), np.int32)
        filled = order_ops.sample(
            block.base, block.addresses, scores, stride, block.coefficients, keys
        )
        place = f"{owner}:sample:{block.name}:{block.offset:020d}"
        return {
            f"{owner}:numel": torch.tensor(block.base.size),
            place: torch.from_numpy(keys[:, :filled]),
        }

    def _guessed(self, summed: State, owner: str) -> list[_Row]:
        prefix = f"{owner}:sample:"
        parts = [summed[key] for key in sorted(summed) if key.startswith(prefix)]
        keys = torch.cat(parts, dim=1).numpy()
        numel, size = int(summed[f"{owner}:numel"]), keys.shape[1]
        positive = torch.from_numpy((keys > 0).sum(1)) * numel // size
        ranks = self.statistic.ranks(0, torch.full((len(keys),), numel), positive)
        rows: list[_Row] = []
        for score, asked in enumerate(cast("list[list[int]]", ranks.tolist())):
            for rank in asked:
                if rank == 0:
                    rows.append(_Row(score, 0, key=_NOBODY))
                    continue
                middle, margin = rank / numel * size, _MARGIN * math.sqrt(size)
                places = [int(middle + margin), int(middle), math.floor(middle - margin)]
                inside = [min(max(size - 1 - place, 0), size - 1) for place in places]
                low, guess, high = (int(k) for k in _select(keys[score], inside))
                low = low if places[0] < size else 0
                top = high + 1 if places[2] >= 0 else _TOP
                rows.append(_Row(score, rank, low, guess, top))
        return rows

    def _counted(self, block: RawBlock, owner: str, rows: list[_Row]) -> State:
        assert block.base is not None
        scores, first = self.scores(block), block.offset // CHUNK
        open_rows = [i for i, row in enumerate(rows) if row.key < 0]
        size = len(open_rows)
        counts = np.zeros((size, 2, 3, BUCKETS), np.int64)
        tied = np.zeros((size, -(-block.numel // CHUNK)), np.int64)
        above, positive = np.zeros(size, np.int64), np.zeros(size, np.int64)
        order_ops.count(
            block.base, block.addresses, np.array([scores[rows[i].score] for i in open_rows]),
            np.stack([rows[i].bracket() for i in open_rows]), CHUNK, counts, tied[:, first:],
            above, positive, block.coefficients,
        )  # fmt: skip
        return {
            f"{owner}:above": torch.from_numpy(above),
            f"{owner}:counts": torch.from_numpy(counts),
            f"{owner}:positive": torch.from_numpy(positive),
            f"{owner}:numel": torch.tensor(block.base.size),
            f"{block.name}:tied": torch.from_numpy(tied),
        }

    def _ties(self, block: RawBlock, rows: list[_Row]) -> Tensor:
        assert block.base is not None
        scores, first = self.scores(block), block.offset // CHUNK
        tied = np.zeros((len(rows), -(-block.numel // CHUNK)), np.int64)
        wanted = [row.key if row.cuts and not row.ties_known else -1 for row in rows]
        order_ops.count_ties(
            block.base, block.addresses, np.array([scores[row.score] for row in rows]),
            np.array(wanted), CHUNK, tied[:, first:], block.coefficients,
        )  # fmt: skip
        return torch.from_numpy(tied)

    def _rank(self, rows: list[_Row], numel: int, positive: Tensor) -> None:
        """Set the ranks that depend on how many scores are positive, now that this is known."""
        ranks = self.statistic.ranks(0, torch.full((len(positive),), numel), positive).flatten()
        for row, rank in zip(rows, cast("list[int]", ranks.tolist()), strict=True):
            row.rank = rank

    def _tied_at_guess(self, summed: State, owner: str) -> Tensor:
        names = [key for key in summed if key.endswith(":tied")]
        own = [key for key in names if self._owner(key.removesuffix(":tied")) == owner]
        return torch.stack([summed[key].sum(1) for key in own]).sum(0)

    def _keep_ties(
        self,
        result: dict[str, Tensor],
        key: str,
        rows: list[_Row],
        open_rows: list[int],
        tied: Tensor,
    ) -> None:
        """Keep the ties, by chunk, of the rows whose key was just found to be the guess."""
        name = f"{key.removesuffix(':tied')}:ties"
        ties = result[name].clone() if name in result else tied.new_zeros(len(rows), tied.shape[1])
        for place, i in enumerate(open_rows):
            if rows[i].ties_known:
                ties[i] = tied[place]
        result[name] = ties


def _narrow(row: _Row, above: int, tied: int, counts: Tensor) -> None:
    """Find the key of a row, or its next bracket, from what was counted in this one."""
    low, guess, top, lower, upper = (int(x) for x in row.bracket())
    if row.rank == 0:
        row.key = _NOBODY
        return
    if row.rank <= above:
        row.low, row.guess, row.top = top, -1, _TOP
        return
    for half, origin, shift in ((1, guess + 1, upper), (0, low, lower)):
        if half == 0 and guess >= low:
            above += tied
            if row.rank <= above:
                row.key, row.left, row.equal = guess, row.rank - (above - tied), tied
                row.ties_known = 1
                return
        found, offsets, squares = cast("list[list[int]]", counts[half].tolist())
        for bucket in range(BUCKETS - 1, -1, -1):
            if not found[bucket]:
                continue
            above += found[bucket]
            if row.rank > above:
                continue
            first = origin + (bucket << shift)
            # by Cauchy and Schwarz; sums that may have overflowed are not believed
            same = found[bucket] * squares[bucket] == offsets[bucket] ** 2
            if same and (found[bucket] << (2 * shift)) < 1 << 62:
                row.key = first + offsets[bucket] // found[bucket]
                row.left, row.equal = row.rank - (above - found[bucket]), found[bucket]
            else:
                row.low, row.guess = first, -1
                row.top = min(first + (1 << shift), top if half else guess)
            return
    row.low, row.guess, row.top = 0, -1, low


def _shift(width: int) -> int:
    """Return by how much distances below `width` are shifted to fit the buckets."""
    return max(0, math.ceil(math.log2(max(1, width) / BUCKETS)))


def _select(keys: NDArray[np.int32], places: list[int]) -> NDArray[np.int32]:
    """Return the keys that would stand at these places if they were sorted."""
    return np.partition(keys, sorted(set(places)))[places]


_FIELDS = ("score", "rank", "low", "guess", "top", "key", "left", "equal", "ties_known")


def _packed(rows: list[_Row]) -> Tensor:
    return torch.tensor([[getattr(row, field) for field in _FIELDS] for row in rows])


def _rows(done: Mapping[str, Tensor], owner: str) -> list[_Row]:
    return [_Row(*row) for row in cast("list[list[int]]", done[f"{owner}:rows"].tolist())]
