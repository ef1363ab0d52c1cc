import pytest
import torch
from task_matrices import drawn, group

from mergewell.methods.ace import Ace


def test_worked_example() -> None:
    # rows +-(1, 0) of one expert, +-(0, 1) of the other: centred, M'M = diag(2, 0), diag(0, 2).
    # Sizes are equal. S = diag(2, 2) + 2 epsilon, P has the rows (1, 1). With epsilon 1/2:
    # S + P = [[4, 1], [1, 4]], M_1 G_1 + M_2 G_2 = +-(2.5, 0) and +-(0, 2.5)
    first = [[1.0, 0.0], [-1.0, 0.0]]
    second = [[0.0, 1.0], [0.0, -1.0]]
    merged = Ace(epsilon=0.5).merge(group(first, second)) - 10
    # (2.5, 2.5) [[4, 1], [1, 4]]^-1 = (0.5, 0.5)
    torch.testing.assert_close(merged, torch.tensor([[0.5, 0.5], [-0.5, -0.5]]).double())


def test_what_all_rows_share_is_lost() -> None:
    taus = [drawn(5, 4, seed=s) for s in range(2)]
    # the size is that of the whole matrix, but for equal sizes it plays no part
    moved = [tau + drawn(4, seed=9) for tau in taus]
    same = [Ace(epsilon=1e-2, threshold=100.0).merge(group(*each)) for each in (taus, moved)]
    torch.testing.assert_close(*same)


def test_uneven_experts_are_evened_out_and_corrected() -> None:
    # the covariances of one expert and 30 times it are the same after division by their traces
    tau = drawn(6, 5)
    tensors = group(tau, 30 * drawn(6, 5, seed=1))
    even = Ace(threshold=100.0).merge(tensors) - 10
    uneven = Ace(threshold=0.1).merge(tensors) - 10
    assert not torch.allclose(even, uneven, atol=0.1)
    # log sizes: with equal sizes the spread is 0, and the threshold is not passed
    equal = group(tau, tau.flip(0))
    torch.testing.assert_close(Ace(threshold=0.0).merge(equal), Ace(threshold=9.0).merge(equal))


@pytest.mark.parametrize("leading", [0.4, 1.0])
def test_the_correction_is_isotropic(leading: float) -> None:
    taus = [drawn(6, 5), 30 * drawn(6, 5, seed=1)]
    plain = Ace(threshold=0.0, leading=0.1).merge(group(*taus)) - 10  # none of 5 directions
    corrected = Ace(threshold=0.0, leading=leading).merge(group(*taus)) - 10
    lengths = torch.linalg.svdvals(corrected - plain)
    count = int(leading * 5)
    torch.testing.assert_close(lengths[:count], lengths[0].expand(count))
    assert float(lengths[0]) > 0.1 and float(lengths[count:].sum()) == pytest.approx(0, abs=1e-6)
