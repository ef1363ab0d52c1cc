import torch

from mergewell.methods.average import Average
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.wise_ft import WiseFt
from mergewell.tensor_group import TensorGroup


def test_worked_example() -> None:
    base = torch.tensor([1.0, 1.0])
    tensors = TensorGroup("w", (base + 4, base - 2), torch.tensor([1.0, 3.0]), base)
    # the mean task vector is (4 - 6) / 4 = -0.5
    assert WiseFt(t=0.5).merge(tensors).tolist() == [0.75, 0.75]


def test_ends_are_base_and_average_and_one_expert_is_task_arithmetic() -> None:
    torch.manual_seed(0)
    base = torch.randn(9)
    tensors = TensorGroup("w", (base + 1, base + torch.randn(9)), torch.ones(2), base)
    assert torch.equal(WiseFt(t=0.0).merge(tensors), base)
    torch.testing.assert_close(WiseFt(t=1.0).merge(tensors), Average().merge(tensors))
    one = TensorGroup("w", tensors.experts[1:], torch.ones(1), base)
    assert torch.equal(WiseFt(t=0.3).merge(one), TaskArithmetic(scale=0.3).merge(one))


def test_refuses_coefficients_that_sum_to_zero() -> None:
    assert "sum to 0" in WiseFt().objection([1.0, -1.0])
