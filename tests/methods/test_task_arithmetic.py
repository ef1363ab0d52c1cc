import torch

from mergewell.methods.average import Average
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.tensor_group import TensorGroup


def test_worked_example() -> None:
    base = torch.tensor([1.0, 1.0])
    group = TensorGroup("w", (base + 1, base - 2), torch.tensor([1.0, 0.5]), base)
    # task vectors 1 and -2, coefficients 1 and 0.5: the sum is 0
    assert TaskArithmetic(scale=0.4).merge(group).tolist() == [1.0, 1.0]
    unlearn = TensorGroup("w", (base + 1,), torch.tensor([-1.0]), base)
    assert TaskArithmetic(scale=0.5).merge(unlearn).tolist() == [0.5, 0.5]


def test_coefficients_one_over_k_at_scale_one_reduce_to_the_average() -> None:
    torch.manual_seed(0)
    base = torch.randn(50, dtype=torch.float64)
    experts = tuple(base + torch.randn(50, dtype=torch.float64) for _ in range(4))
    group = TensorGroup("w", experts, torch.full((4,), 0.25, dtype=torch.float64), base)
    expected = Average().merge(group)
    torch.testing.assert_close(TaskArithmetic(scale=1.0).merge(group), expected)


def test_divisors() -> None:
    base = torch.zeros(1)
    tensors = TensorGroup("w", (base + 4, base + 2), torch.tensor([1.0, 3.0]), base)
    assert TaskArithmetic(scale=1.0).merge(tensors).tolist() == [10.0]
    assert TaskArithmetic(scale=1.0, divide="count").merge(tensors).tolist() == [5.0]
    assert TaskArithmetic(scale=1.0, divide="coefficients").merge(tensors).tolist() == [2.5]
    opposed = TensorGroup("w", (base + 4, base + 2), torch.tensor([1.0, -1.0]), base)
    assert TaskArithmetic(scale=1.0, divide="coefficients").merge(opposed).tolist() == [2.0]
