import pytest
import torch

from mergewell.statistics.importance import ImportanceQuartiles, importance
from mergewell.tensor_group import TensorGroup


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 9])
def test_quartiles_are_at_the_places_that_mergekit_takes(size: int) -> None:
    torch.manual_seed(size)
    base = torch.randn(size)
    tensors = TensorGroup("w", (base + torch.randn(size),), torch.ones(1), base)
    ordered = importance(tensors).sort().values
    expected = [float(ordered[int(q * (size - 1))]) for q in (0.25, 0.5, 0.75)]
    quartiles = ImportanceQuartiles().measure([tensors])["w"]["quartiles"]
    assert quartiles.tolist() == expected
