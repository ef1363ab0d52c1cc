import pytest
import torch
from task_matrices import drawn, group

from mergewell.methods.iso_c import IsoC
from mergewell.methods.iso_cts import IsoCts


def test_worked_example() -> None:
    # rank 4, two experts, common 1/2: two common directions, one own each. The sum is
    # diag(8, 6, 2, 1): common are e1 and e2. What is left of the experts is diag(0, 0, 5, 1) and
    # diag(0, 0, -3, 0), or with -4 for the last entry e4. Lengths 8, 6, 5, 4 have the mean 23 / 4
    first = torch.diag(torch.tensor([8.0, 0.0, 5.0, 1.0]))
    second = torch.diag(torch.tensor([0.0, 6.0, -3.0, -4.0]))
    merged = IsoCts(common=0.5).merge(group(first, second)) - 10
    expected = torch.diag(torch.tensor([5.75, 5.75, 5.75, -5.75], dtype=torch.float64))
    torch.testing.assert_close(merged, expected)


def test_all_directions_common_is_iso_c() -> None:
    tensors = group(*(drawn(8, 12, seed=s) for s in range(3)))
    torch.testing.assert_close(IsoCts(common=1.0).merge(tensors), IsoC().merge(tensors))


@pytest.mark.parametrize("common", [0.0, 0.3, 0.8])
def test_result_has_one_length_in_all_directions(common: float) -> None:
    tensors = group(*(drawn(12, 20, seed=s) for s in range(3)))
    lengths = torch.linalg.svdvals(IsoCts(common=common).merge(tensors) - 10)
    torch.testing.assert_close(lengths, lengths.mean().expand(12))
    assert lengths[0] > 1


def test_an_expert_within_the_common_directions_adds_none() -> None:
    # rank 1 experts along the same direction: nothing is left for own directions
    tau = torch.outer(drawn(8, seed=1), drawn(9, seed=2))
    merged = IsoCts(common=0.5).merge(group(tau, tau)) - 10
    torch.testing.assert_close(merged, 2 * tau)


def test_fewer_directions_than_experts() -> None:
    tensors = group(*(drawn(2, 5, seed=s) for s in range(3)))
    for common in (0.0, 0.5):
        torch.testing.assert_close(IsoCts(common=common).merge(tensors), IsoC().merge(tensors))
