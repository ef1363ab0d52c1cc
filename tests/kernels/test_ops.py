"""What the compiled loops share: the tally of a block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mergewell.changes import change_of
from mergewell.kernels import ops
from mergewell.kernels.base import Fused, as_tensor, stored

DTYPES = [torch.bfloat16, torch.float32]
SIZES = [1, ops.STEP - 1, ops.STEP, ops.TILE + 1, 3 * ops.TILE + ops.STEP + 7]


def copied(tensor: Tensor, reference: Tensor) -> Fused:
    """Return the average of one expert, with its tally against a reference."""
    expert = stored(tensor)
    one = np.ones(1, np.float32 if tensor.dtype == torch.bfloat16 else np.float64)
    out = np.empty_like(expert)
    addresses = np.array([expert.ctypes.data], np.int64)
    return Fused.of(out, ops.average(addresses, one, one[0], False, stored(reference), out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_tally_is_how_far_the_result_is_from_the_reference(
    size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(size)
    new, old = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    found, expected = copied(new, old), change_of(new, old)
    assert torch.equal(as_tensor(found.out), new)
    assert (found.finite, found.changed) == (True, expected.changed)
    assert found.moved == pytest.approx(expected.moved, rel=1e-5)
    assert found.original == pytest.approx(expected.original, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, ops.STEP, 2 * ops.TILE + 6])
def test_one_element_among_many_is_seen(place: int, dtype: torch.dtype) -> None:
    old = torch.ones(2 * ops.TILE + 7, dtype=dtype)
    assert not copied(old, old).changed
    new = old.clone()
    new[place] = 1 + 2.0**-7
    assert copied(new, old).changed
    for bad in (torch.inf, torch.nan):
        new[place] = bad
        assert not copied(new, old).finite
        assert not copied(old, new).finite


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("new", "old", "changed"),
    [(0.0, -0.0, False), (-0.0, 0.0, False), (-0.0, -0.0, False), (1.0, -1.0, True),
     (0.0, 1e-40, True), (-1e-40, -0.0, True), (1e-40, -1e-40, True)],
)  # fmt: skip
def test_the_two_zeros_are_one_number(
    new: float, old: float, changed: bool, dtype: torch.dtype
) -> None:
    left, right = (torch.full((3,), value, dtype=dtype) for value in (new, old))
    assert copied(left, right).changed is changed
    assert change_of(left, right).changed is changed
