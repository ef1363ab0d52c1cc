import pytest
import torch
from task_matrices import drawn, group

from mergewell.methods.dc_merge import DcMerge
from mergewell.methods.tsv import Tsv


def test_worked_example() -> None:
    # as for tsv: U = [(3, -1), (1, 3)] / sqrt(10), V = 1. In it 3 e1 e1' is (9, 3)' / sqrt(10) in
    # the first column, 2 (.6, .8) e2' is (2, 6)' / sqrt(10) in the second. The blocks of the
    # experts are the diagonal: 9 and 6 stay, if the share that is kept holds one entry or two
    tensors = group([[3.0, 0.0], [0.0, 1.0]], [[0.0, 1.2], [0.0, 1.6]])
    for keep in (0.1, 0.5):
        merged = DcMerge(keep=keep).merge(tensors) - 10
        expected = torch.tensor([[27.0, 6.0], [-9.0, 18.0]], dtype=torch.float64) / 10
        torch.testing.assert_close(merged, expected)


def test_experts_in_orthogonal_directions_give_tsv() -> None:
    left, right = (torch.linalg.qr(drawn(9, 8, seed=s)).Q for s in (1, 2))
    lengths = torch.arange(8.0, 0.0, -1.0, dtype=torch.float64)
    parts = [(left * lengths)[:, cut] @ right[:, cut].T for cut in (slice(0, 4), slice(4, 8))]
    # of 64 entries each expert has 4, on its diagonal; more would be rounding, which votes as well
    merged = DcMerge(keep=4 / 64).merge(group(*parts))
    torch.testing.assert_close(merged, Tsv().merge(group(*parts)))


@pytest.mark.parametrize(
    ("smooth", "expected"),
    [("average", [2.0, 2.0, 2.0]), ("linear", [10 / 3, 2.0, 2 / 3]), ("none", [3.0, 2.5, 0.5])],
)
def test_singular_values_are_smoothed_at_the_same_sum(smooth: str, expected: list) -> None:
    tau = torch.diag(torch.tensor([3.0, 2.5, 0.5]))
    merged = DcMerge(keep=1.0, smooth=smooth).merge(group(tau)) - 10
    torch.testing.assert_close(merged.diagonal(), torch.tensor(expected, dtype=torch.float64))
