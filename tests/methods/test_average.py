import torch

from mergewell.methods.average import Average
from mergewell.tensor_group import TensorGroup


def test_worked_example() -> None:
    experts = (torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0]))
    group = TensorGroup("w", experts, torch.tensor([1.0, 3.0]))
    assert Average().merge(group).tolist() == [2.5, 1.0]  # (1 + 9) / 4, (4 + 0) / 4
    assert Average(normalize=False).merge(group).tolist() == [10.0, 4.0]


def test_refuses_coefficients_that_sum_to_zero() -> None:
    assert "sum to 0" in Average().objection([1.0, -1.0])
    assert not Average(normalize=False).objection([1.0, -1.0])
