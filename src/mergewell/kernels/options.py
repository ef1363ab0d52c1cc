"""What the fused forms of sparse merges share. Not a method's name: nothing is looked up here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mergewell.kernels.base import RawBlock
from mergewell.methods.ops import SparseMerge
from mergewell.tensor_group import CHUNK, Value, random_key

_DIVIDE = {"none": 0, "count": 1, "coefficients": 2}


def combination(method: SparseMerge, experts: int) -> tuple[bool, bool, bool, int, int]:
    """Return how thinned task vectors are combined: the options of `sparse_ops.combine`."""
    agreeing = method.combine == "agreeing"
    usual = 1 if agreeing else 0
    divide = usual if method.divide == "usual" else _DIVIDE[method.divide]
    return agreeing, method.elect == "count", method.votes == "weighted", divide, experts


def draws(
    block: RawBlock, densities: Sequence[float]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return the keys of the experts' random numbers, [K], and below which of 2^24 they keep."""
    keys = np.array([random_key(block.seed, block.name, k) for k in range(len(densities))])
    # an integer number is below the limit just where number / 2^24 is below the density
    return keys, np.ceil(np.array(densities, np.float64) * (1 << 24)).astype(np.int32)


def chunks_of(block: RawBlock) -> int:
    """Return how many chunks a block has."""
    return -(-block.reference.size // CHUNK)


def ties_left(value: Value, block: RawBlock) -> NDArray[np.int64]:
    """Return how many entries at each threshold may be taken from each of a block's chunks on.

    [rows, chunks + 1], the last after the block; -1 for all.
    """
    first, size = block.offset // CHUNK, chunks_of(block) + 1
    left = np.full((len(value["key"]), size), -1)
    if "ties_before" in value:
        left[:] = 0  # after the tensor none
        before = value["ties_before"][:, first : first + size]
        left[:, : before.shape[1]] = (value["ties_kept"][:, None] - before).clamp(min=0).numpy()
    return left


def selection(value: Value, block: RawBlock) -> tuple[int, NDArray[np.int64]]:
    """Return the key down to which a block's entries are selected, and `ties_left` of it."""
    if "key" not in value:
        return 0, np.full(chunks_of(block) + 1, -1)
    return int(value["key"][0]), ties_left(value, block)[0]
