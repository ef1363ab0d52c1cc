import torch
from task_matrices import drawn, group

from mergewell.methods.star import Star
from mergewell.methods.task_arithmetic import TaskArithmetic


def test_worked_example() -> None:
    # of 5 + 3 + 2 = 10, 40 % are held by the first, which becomes 10; 60 % by two, times 10 / 8
    tau = torch.diag(torch.tensor([5.0, 3.0, 2.0]))
    one = Star(keep=0.4).merge(group(tau)) - 10
    torch.testing.assert_close(one, torch.diag(torch.tensor([10.0, 0.0, 0.0])).double())
    two = Star(keep=0.6).merge(group(tau)) - 10
    torch.testing.assert_close(two, torch.diag(torch.tensor([6.25, 3.75, 0.0])).double())
    exactly = Star(keep=0.5).merge(group(tau)) - 10
    torch.testing.assert_close(exactly, one)
    pair = Star(keep=0.4, scale=2.0).merge(group(tau, torch.zeros(3, 3))) - 10
    torch.testing.assert_close(pair, one)


def test_all_kept_is_the_average() -> None:
    tensors = group(*(drawn(5, 8, seed=s) for s in range(3)), coefficients=[1.0, 2.0, -1.0])
    plain = TaskArithmetic(scale=1.0, divide="count").merge(tensors)
    torch.testing.assert_close(Star(keep=1.0).merge(tensors), plain)
