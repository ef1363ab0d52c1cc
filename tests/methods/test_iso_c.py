import torch
from task_matrices import drawn, group

from mergewell.methods.iso_c import IsoC
from mergewell.methods.task_arithmetic import TaskArithmetic


def test_worked_example() -> None:
    # the sum is [[0, 3], [1, 0]], whose singular values 3 and 1 become 2
    merged = IsoC().merge(group([[0.0, 3.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]])) - 10
    torch.testing.assert_close(merged, torch.tensor([[0.0, 2.0], [2.0, 0.0]]).double())
    half = IsoC(isotropy=0.5, scale=2.0).merge(group([[0.0, 3.0], [1.0, 0.0]])) - 10
    torch.testing.assert_close(half, torch.tensor([[0.0, 5.0], [3.0, 0.0]]).double())


def test_result_has_one_length_in_all_directions() -> None:
    taus = [drawn(6, 9, seed=s) for s in range(3)]
    lengths = torch.linalg.svdvals(IsoC().merge(group(*taus)) - 10)
    mean = torch.linalg.svdvals(torch.stack(taus).sum(0)).mean()
    torch.testing.assert_close(lengths, mean.expand(6))


def test_without_isotropy_it_is_the_plain_sum() -> None:
    tensors = group(*(drawn(7, 4, seed=s) for s in range(3)))
    plain = TaskArithmetic(scale=1.0).merge(tensors)
    torch.testing.assert_close(IsoC(isotropy=0.0).merge(tensors), plain)


def test_directions_that_the_sum_lacks_stay_out() -> None:
    # rank 1 of 3: its only singular value is the mean, and nothing is lifted beside it
    tau = torch.outer(drawn(3, seed=1), drawn(4, seed=2))
    torch.testing.assert_close(IsoC().merge(group(tau)) - 10, tau)
