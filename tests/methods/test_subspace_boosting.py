import torch
from task_matrices import drawn, group

from mergewell.methods.iso_c import IsoC
from mergewell.methods.subspace_boosting import SubspaceBoosting
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.ties import Ties

SUM = TaskArithmetic(scale=1.0)


def test_worked_example() -> None:
    # singular values 6, 3, 1: the running sum 6, 9, 10 reaches 70 % at the second, 3
    tau = torch.diag(torch.tensor([6.0, 3.0, 1.0]))
    merged = SubspaceBoosting(beta=0.7, of=SUM).merge(group(tau)) - 10
    torch.testing.assert_close(merged, torch.diag(torch.tensor([6.0, 3.0, 3.0])).double())
    flat = SubspaceBoosting(beta=0.01, of=SUM, scale=0.5).merge(group(tau)) - 10
    torch.testing.assert_close(flat, 3 * torch.eye(3).double())


def test_beta_1_is_the_inner_method() -> None:
    tensors = group(*(drawn(6, 5, seed=s) for s in range(3)))
    for inner in (SUM, Ties(density=0.5)):
        merged = SubspaceBoosting(beta=1.0, of=inner).merge(tensors)
        torch.testing.assert_close(merged, inner.merge(tensors))


def test_nothing_is_left_to_raise_of_iso_c() -> None:
    tensors = group(*(drawn(6, 5, seed=s) for s in range(3)))
    merged = SubspaceBoosting(beta=0.3, of=IsoC()).merge(tensors)
    torch.testing.assert_close(merged, IsoC().merge(tensors))
