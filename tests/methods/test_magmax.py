import torch

from mergewell.methods.magmax import Magmax
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.tensor_group import TensorGroup


def group(*task_vectors: list[float], coefficients: list[float] | None = None) -> TensorGroup:
    taus = [torch.tensor(tau) for tau in task_vectors]
    base = torch.full_like(taus[0], 10.0)
    given = torch.tensor(coefficients or [1.0] * len(taus))
    return TensorGroup("w", tuple(base + tau for tau in taus), given, base)


def test_worked_example() -> None:
    tensors = group([1.0, -4.0, 2.0], [-3.0, 2.0, -2.0], [0.0, 3.0, 0.0])
    assert Magmax(scale=1.0).merge(tensors).tolist() == [7.0, 6.0, 12.0]
    assert Magmax().merge(tensors).tolist() == [8.5, 8.0, 11.0]


def test_coefficients_decide_before_the_comparison() -> None:
    tensors = group([1.0], [-3.0], coefficients=[4.0, 1.0])
    assert Magmax(scale=1.0).merge(tensors).tolist() == [14.0]


def test_disjoint_changes_reduce_to_task_arithmetic() -> None:
    tensors = group([1.0, 0.0, 2.0], [0.0, -3.0, 0.0])
    sums = TaskArithmetic(scale=0.5).merge(tensors)
    assert torch.equal(Magmax().merge(tensors), sums)
