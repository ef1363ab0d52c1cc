import pytest
import torch
from task_matrices import drawn, group

from mergewell.methods.opcm import Opcm
from mergewell.methods.task_arithmetic import TaskArithmetic


def test_worked_example() -> None:
    # merged so far diag(6, 3, 1): the running sum 6, 9, 10 passes half at the first (p = 0), 80 %
    # at the second (p = 1), 95 % at the third (p = 2). The next one loses its diagonal, and with
    # p = 2 its entries at (0, 1) and (1, 0)
    first = torch.diag(torch.tensor([6.0, 3.0, 1.0]))
    second = torch.tensor([[1.0, 2.0, 2.0], [4.0, 1.0, 2.0], [2.0, 2.0, 1.0]])
    mean = (46**0.5 + 39**0.5) / 2
    off = second - torch.diag(second.diagonal())
    for alpha in (0.5, 0.8):
        summed = (first + off).double()
        merged = Opcm(alpha=alpha).merge(group(first, second)) - 10
        torch.testing.assert_close(merged, summed * (mean / float(summed.norm())))
    off[0, 1] = off[1, 0] = 0
    summed = (first + off).double()
    merged = Opcm(alpha=0.95).merge(group(first, second)) - 10
    torch.testing.assert_close(merged, summed * (mean / float(summed.norm())))


def test_what_lies_outside_is_added_whole() -> None:
    first, second = torch.zeros(3, 4), torch.zeros(3, 4)
    first[0, 0], second[1, 2] = 3.0, 3.0
    merged = Opcm().merge(group(first, second)) - 10
    assert merged[0, 0].item() == pytest.approx(3 / 2**0.5)
    assert merged[1, 2].item() == pytest.approx(3 / 2**0.5)


def test_an_expert_seen_before_adds_nothing_and_vectors_are_averaged() -> None:
    tau = drawn(4, 6)
    torch.testing.assert_close(Opcm().merge(group(tau, tau)) - 10, tau)
    torch.testing.assert_close(Opcm().merge(group(torch.zeros(4, 6), tau)) - 10, tau / 2)
    vectors = group(drawn(5, seed=1), drawn(5, seed=2))
    average = TaskArithmetic(scale=1.0, divide="count").merge(vectors)
    torch.testing.assert_close(Opcm().merge(vectors), average)
