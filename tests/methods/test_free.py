import pytest
import torch
from task_matrices import drawn, group

from mergewell.methods.free import Free
from mergewell.methods.metagpt import Metagpt
from mergewell.methods.task_arithmetic import TaskArithmetic


def test_worked_example() -> None:
    # [[3, 1], [1, 3]] has frequency 0 (mean 2) and the highest one, [[1, -1], [-1, 1]]. Its mean
    # size is 2, that of the second 1: weights 2/3 and 1/3
    first, second = [[3.0, 1.0], [1.0, 3.0]], [[1.0, -1.0], [-1.0, 1.0]]
    high = torch.tensor(second, dtype=torch.float64)
    merged = Free(scale=1.0).merge(group(first, second)) - 10
    torch.testing.assert_close(merged, high)
    whole = Free(scale=1.0, cutoff=0.0).merge(group(first, second)) - 10
    torch.testing.assert_close(whole, high + 4 / 3)
    aligned = Free(scale=1.0, align=True).merge(group(first, second)) - 10
    torch.testing.assert_close(aligned, 1.5 * high)  # 1/2 of the first and 1/2 of twice the second


def test_frequencies_count_by_their_distance_to_zero() -> None:
    # rows of a wave with frequency 1/8, a quarter of the highest along one side (1/2 / sqrt(1/2))
    wave = torch.cos(torch.arange(16).double() * torch.pi / 4).expand(4, 16)
    share = (1 / 8) / 0.5**0.5
    kept = Free(scale=1.0, cutoff=share - 1e-3).merge(group(wave)) - 10
    torch.testing.assert_close(kept, wave.clone())
    gone = Free(scale=1.0, cutoff=share + 1e-3).merge(group(wave)) - 10
    assert float(gone.abs().max()) == pytest.approx(0, abs=1e-9)
    turned = Free(scale=1.0, cutoff=share + 1e-3).merge(group(wave.T)) - 10
    assert float(turned.abs().max()) == pytest.approx(0, abs=1e-9)


def test_experts_of_equal_size_unfiltered_are_averaged() -> None:
    tau = drawn(5, 7)
    tensors = group(tau, -tau.flip(0), tau.flip(1))
    merged = Free(cutoff=0.0, scale=1.0).merge(tensors)
    torch.testing.assert_close(merged, Metagpt(scope="tensor").merge(tensors))
    vectors = group(drawn(5, seed=1), drawn(5, seed=2))
    average = TaskArithmetic(scale=0.7, divide="count").merge(vectors)
    torch.testing.assert_close(Free().merge(vectors), average)
