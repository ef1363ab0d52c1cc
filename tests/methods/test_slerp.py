import math

import pytest
import torch

from mergewell.methods.slerp import Slerp
from mergewell.tensor_group import TensorGroup


def group(first: list[float], second: list[float]) -> TensorGroup:
    return TensorGroup("w", (torch.tensor(first), torch.tensor(second)), torch.ones(2))


def test_worked_example_on_a_quarter_circle() -> None:
    middle = Slerp(t=0.5).merge(group([1.0, 0.0], [0.0, 1.0]))
    assert middle.tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    third = Slerp(t=1 / 3).merge(group([1.0, 0.0], [0.0, 1.0]))
    assert third.tolist() == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)])


def test_ends_are_the_experts() -> None:
    tensors = group([1.0, 2.0, -1.0], [0.5, -1.0, 2.0])
    torch.testing.assert_close(Slerp(t=0.0).merge(tensors), tensors.experts[0])
    torch.testing.assert_close(Slerp(t=1.0).merge(tensors), tensors.experts[1])


def test_nearly_parallel_and_zero_tensors_take_the_straight_line() -> None:
    assert Slerp(t=0.25).merge(group([1.0, 0.0], [3.0, 0.0])).tolist() == [1.5, 0.0]
    assert Slerp(t=0.25).merge(group([0.0, 0.0], [4.0, 0.0])).tolist() == [1.0, 0.0]
