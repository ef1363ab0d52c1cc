import math

import pytest
import torch

from mergewell.methods.arcee_fusion import ArceeFusion
from mergewell.methods.keep import Keep
from mergewell.statistics.importance import importance
from mergewell.tensor_group import TensorGroup


def group(base: torch.Tensor, tau: torch.Tensor) -> TensorGroup:
    return TensorGroup("w", (base + tau,), torch.ones(1), base)


def test_worked_example_of_the_importance() -> None:
    # one row of the base is flat: probabilities 1/2, 1/2; the expert's are 3/4, 1/4
    tensors = group(torch.zeros(2, 2), torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]))
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    expected = [[math.log(3.0) * divergence, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(importance(tensors).float(), torch.tensor(expected))


def test_takes_over_what_lies_beyond_the_quartiles() -> None:
    torch.manual_seed(0)
    base, tau = torch.randn(30, 40), 0.1 * torch.randn(30, 40)
    tensors = group(base, tau)
    scores = importance(tensors).flatten()
    first, median, third = (scores.sort().values[int(q * 1199)] for q in (0.25, 0.5, 0.75))
    taken = (scores >= median + 1.5 * (third - first)).view(30, 40)
    assert 0 < taken.sum() < 600
    merged = ArceeFusion().merge(tensors)
    assert torch.equal(merged, torch.where(taken, base + tau, base))


def test_a_low_threshold_reduces_to_the_expert() -> None:
    torch.manual_seed(0)
    tensors = group(torch.randn(6, 8), torch.randn(6, 8))
    everything = ArceeFusion(spread=-1e6).merge(tensors)
    torch.testing.assert_close(everything, Keep(model=1).merge(tensors))
    assert ArceeFusion(spread=1e6).merge(tensors).tolist() == tensors.required_base.tolist()


@pytest.mark.parametrize("shape", [(9,), (4, 3, 2, 2), (0, 3), ()])
def test_any_shape_is_taken(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors = group(torch.randn(shape), torch.randn(shape))
    assert ArceeFusion().merge(tensors).shape == shape
