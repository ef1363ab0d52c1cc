import pytest
import torch

from mergewell.methods.keep import Keep
from mergewell.methods.nearswap import Nearswap
from mergewell.tensor_group import TensorGroup


def test_worked_example_moves_by_t_at_most() -> None:
    first, second = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.05, 3.0, 0.5, 1.0])
    merged = Nearswap(t=0.1).merge(TensorGroup("w", (first, second), torch.ones(2)))
    assert merged.tolist() == pytest.approx([1.05, 1.1, 0.9, 1.0])


def test_a_t_beyond_all_distances_reduces_to_keeping_the_second() -> None:
    torch.manual_seed(0)
    tensors = TensorGroup("w", (torch.randn(20), torch.randn(20)), torch.ones(2))
    assert torch.equal(Nearswap(t=100.0).merge(tensors), Keep(model=2).merge(tensors))
