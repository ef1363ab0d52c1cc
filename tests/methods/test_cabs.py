import pytest
import torch
from pydantic import ValidationError

from mergewell.methods.cabs import Cabs
from mergewell.methods.magmax import Magmax
from mergewell.tensor_group import TensorGroup


def group(*task_vectors: list) -> TensorGroup:
    taus = [torch.tensor(tau) for tau in task_vectors]
    base = torch.full_like(taus[0], 10.0)
    return TensorGroup("w", tuple(base + tau for tau in taus), torch.ones(len(taus)), base)


def test_worked_example() -> None:
    # groups of 4: the first takes -9 and 4, then 2 and 2 (from the front); what is left for the
    # second are 7 and 1 of the first group, then 6 and -3
    tensors = group([4.0, 1.0, -9.0, 3.0, 2.0, 2.0, 2.0, 0.0], [8.0, 7.0, 8.0, 1.0, 9, 9, 6, -3])
    merged = Cabs(n=2, m=4).merge(tensors)
    assert (merged - 10).tolist() == [4.0, 7.0, -9.0, 1.0, 2.0, 2.0, 6.0, -3.0]


def test_groups_do_not_cross_rows_and_a_shorter_one_at_the_end_keeps_n_or_nothing() -> None:
    tensors = group([[5.0, 4.0, 1.0], [1.0, 2.0, 3.0]])
    assert (Cabs(n=1, m=2).merge(tensors) - 10).tolist() == [[5, 0, 1], [0, 2, 3]]
    dropped = Cabs(n=1, m=2, remainder="drop").merge(tensors) - 10
    assert dropped.tolist() == [[5, 0, 0], [0, 2, 0]]


def test_no_entry_belongs_to_two_experts() -> None:
    torch.manual_seed(0)
    taus = [torch.full((6, 32), float(10**k)) + torch.rand(6, 32) for k in range(3)]
    merged = Cabs(n=8, m=32).merge(group(*[tau.tolist() for tau in taus])) - 10
    for k in range(3):
        own = (merged >= 10**k) & (merged < 10**k + 2)
        assert own.sum(1).tolist() == [8] * 6
    assert (merged.abs() < 1e-4).sum(1).tolist() == [8] * 6


def test_one_expert_with_one_of_one_reduces_to_magmax() -> None:
    tensors = group([1.0, -2.0, 3.0])
    assert torch.equal(Cabs(n=1, m=1).merge(tensors), Magmax(scale=1.0).merge(tensors))


def test_more_of_a_group_than_there_is_is_refused() -> None:
    with pytest.raises(ValidationError, match="lower n"):
        Cabs(n=5, m=4)
