import torch

from mergewell.methods.emr import Emr
from mergewell.methods.magmax import Magmax
from mergewell.tensor_group import TensorGroup


def group(*task_vectors: list[float]) -> TensorGroup:
    taus = [torch.tensor(tau) for tau in task_vectors]
    base = torch.full_like(taus[0], 10.0)
    return TensorGroup("w", tuple(base + tau for tau in taus), torch.ones(len(taus)), base)


def test_worked_example() -> None:
    # sums 2, -1, 0 (a draw elects plus): the largest of that sign
    tensors = group([5.0, 2.0, 1.0], [-6.0, -1.0, -1.0], [3.0, -2.0, 0.0])
    assert Emr().merge(tensors).tolist() == [15.0, 8.0, 11.0]
    assert Emr(scale=0.5).merge(tensors).tolist() == [12.5, 9.0, 10.5]


def test_changes_of_one_sign_reduce_to_magmax() -> None:
    tensors = group([1.0, -4.0], [3.0, -2.0])
    assert torch.equal(Emr().merge(tensors), Magmax(scale=1.0).merge(tensors))
