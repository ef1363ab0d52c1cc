import math

import pytest
import torch
from task_matrices import drawn

from mergewell.methods.coram import Coram
from mergewell.tensor_group import TensorGroup


def group(base: torch.Tensor, *experts: torch.Tensor) -> TensorGroup:
    ones = torch.ones(len(experts), dtype=torch.float64)
    return TensorGroup("layer.weight", experts, ones, base)


def turn(degrees: float) -> torch.Tensor:
    a = math.radians(degrees)
    return torch.tensor(
        [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64
    )


def test_worked_example() -> None:
    # base diag(4, 1); experts turned by 20 and 40 degrees, with lengths times 1.5 and 0.5: the
    # mean is turned by 30, at the base's lengths. Then kappa sqrt(2) times the difference
    base = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    tensors = group(base, 1.5 * turn(20) @ base, 0.5 * turn(40) @ base)
    merged = Coram(amplification=1 / 2**0.5).merge(tensors)
    torch.testing.assert_close(merged, turn(30) @ base)
    twice = Coram(amplification=2 / 2**0.5).merge(tensors)
    torch.testing.assert_close(twice, base + 2 * (turn(30) @ base - base))


@pytest.mark.parametrize("shape", [(16, 20), (19, 20), (5, 20), (20, 5), (24, 3, 2, 2)])
def test_one_expert_unamplified_comes_back(shape: tuple[int, ...]) -> None:
    base = drawn(*shape)
    expert = base + 0.1 * drawn(*shape, seed=1)
    torch.testing.assert_close(Coram(amplification=1.0).merge(group(base, expert)), expert)


def test_slices_are_merged_each_by_itself() -> None:
    base = drawn(16, 20)
    experts = [base + 0.1 * drawn(16, 20, seed=s) for s in (1, 2)]
    whole = Coram(amplification=1.0).merge(group(base, *experts))
    top = Coram(amplification=1.0).merge(group(base[:8], *(e[:8] for e in experts)))
    torch.testing.assert_close(whole[:8], top)
    other = Coram(amplification=1.0, height=16).merge(group(base, *experts))
    assert not torch.allclose(whole, other)


@pytest.mark.parametrize(("ratio", "kappa"), [(1.0, 1.15), (3.0, 1.15), (16.0, 0.5), (99.0, 0.5)])
def test_amplification_follows_the_dispersion_of_sizes(ratio: float, kappa: float) -> None:
    base, change = drawn(8, 12), 1e-3 * drawn(8, 12, seed=1)
    tensors = group(base, base + change, base + ratio * change)
    merged = Coram().merge(tensors) - base
    fixed = Coram(amplification=kappa).merge(tensors) - base
    torch.testing.assert_close(merged, fixed)
