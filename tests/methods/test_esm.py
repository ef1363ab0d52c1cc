import torch
from task_matrices import drawn, group

from mergewell.methods.esm import Esm
from mergewell.methods.tsv import Tsv


def test_worked_example() -> None:
    # 3 e1 e1' and 1 e2 e2': mean norm 2, so experts count (3/2)^2 and (1/2)^2, and so do inputs
    tensors = group([[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]])
    merged = Esm(input_power=0.0).merge(tensors) - 10
    torch.testing.assert_close(merged.diagonal(), torch.tensor([6.75, 0.25]).double())
    merged = Esm(scale=2.0).merge(tensors) - 10
    expected = torch.tensor([2 * 6.75 * 2.25, 2 * 0.25 * 0.25]).double()
    torch.testing.assert_close(merged.diagonal(), expected)
    merged = Esm(expert_power=0.0, input_power=1.0).merge(tensors) - 10
    torch.testing.assert_close(merged.diagonal(), torch.tensor([4.5, 0.5]).double())


def test_without_scaling_it_is_tsv() -> None:
    tensors = group(*(drawn(9, 6, seed=s) for s in range(3)))
    merged = Esm(expert_power=0.0, input_power=0.0).merge(tensors)
    torch.testing.assert_close(merged, Tsv().merge(tensors))
