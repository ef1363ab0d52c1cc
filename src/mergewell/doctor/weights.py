"""What one reading of all weights shows: lengths, angles, numbers that are none, rounding.

Shapes: K experts; V vectors: the reference, the experts less the reference and, of a merge, the
result less the reference; n elements of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mergewell.engines.base import make_engine, one_thread_a_worker
from mergewell.storage.base import Checkpoint

_READ = 1 << 20
"""Elements of each model that are read at a time."""


@dataclass(frozen=True, slots=True)
class TensorSums:
    """Sums over the elements of one tensor; parts are added up with `+`."""

    products: Tensor
    """Inner products of the vectors, [V, V], float64; of finite elements only."""

    not_finite: Tensor
    """How many elements of each model are NaN or infinite, int64 [V]."""

    lost: Tensor
    """Squared change of a plain merge by rounding it to its dtype, and by merging, [2]."""

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.products + other.products,
            self.not_finite + other.not_finite,
            self.lost + other.lost,
        )


def measured_weights(
    models: Sequence[Checkpoint],
    names: Sequence[str],
    *,
    shares: Sequence[float],
    stored: Callable[[str], torch.dtype],
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, TensorSums]:
    """Return the sums of tensors that all models have, the reference first; each is read once.

    `shares` scale the experts in a plain merge, reference + sum_k share_k (expert_k - reference),
    which is rounded to the dtype that `stored` gives.
    """
    sizes = {name: models[0].spec(name).numel for name in names}
    blocks = [(name, start) for name in names for start in range(0, sizes[name], _READ)]

    def measure(block: tuple[str, int]) -> TensorSums:
        name, start = block
        stop = min(start + _READ, sizes[name])
        return _sums([m.read(name, start, stop) for m in models], shares, stored(name))

    found: dict[str, TensorSums] = {}
    with one_thread_a_worker():
        for (name, start), part in zip(blocks, make_engine().imap(measure, blocks), strict=True):
            found[name] = found[name] + part if name in found else part
            if on_progress is not None:
                on_progress(min(_READ, sizes[name] - start))
    return found


def _sums(values: Sequence[Tensor], shares: Sequence[float], stored: torch.dtype) -> TensorSums:
    """Return the sums of one block, [n] of each model as it is stored."""
    wide = torch.stack([value.to(torch.float64) for value in values])
    bad = ~wide.isfinite()
    wide.masked_fill_(bad, 0.0)
    reference = wide[0].clone()
    wide[1:] -= reference
    moved = torch.tensor(shares, dtype=torch.float64) @ wide[1 : len(shares) + 1]
    plain = reference + moved
    rounded = plain.to(stored).to(torch.float64)
    lost = torch.stack([(rounded - plain).square().sum(), moved.square().sum()])
    lost = lost.nan_to_num(nan=0.0, posinf=0.0)  # what overflows the dtype is told elsewhere
    return TensorSums(wide @ wide.T, bad.sum(1), lost)
