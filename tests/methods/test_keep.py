import pytest
import torch

from mergewell.errors import MethodError
from mergewell.methods.keep import Keep
from mergewell.tensor_group import TensorGroup


def test_worked_example() -> None:
    base, first, second = torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)
    group = TensorGroup("w", (first, second), torch.ones(2), base)
    assert [Keep(model=i).merge(group).tolist() for i in range(3)] == [[0, 0], [1, 1], [2, 2]]
    with pytest.raises(MethodError, match="no expert 3"):
        Keep(model=3).merge(group)
