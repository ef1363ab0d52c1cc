import torch

from mergewell.methods.average import Average
from mergewell.methods.interpolate import Interpolate
from mergewell.tensor_group import TensorGroup


def test_worked_example_and_ends() -> None:
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])
    tensors = TensorGroup("w", (first, second), torch.ones(2))
    assert Interpolate(t=0.25).merge(tensors).tolist() == [2.0, 1.0]
    assert Interpolate(t=0.0).merge(tensors).tolist() == [1.0, 2.0]
    assert Interpolate(t=1.5).merge(tensors).tolist() == [7.0, -4.0]


def test_reduces_to_the_average() -> None:
    torch.manual_seed(0)
    tensors = TensorGroup("w", (torch.randn(9), torch.randn(9)), torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(Interpolate(t=0.7).merge(tensors), Average().merge(tensors))
