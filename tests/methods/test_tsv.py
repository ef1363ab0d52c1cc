import pytest
import torch
from task_matrices import drawn, group

from mergewell.methods.tsv import Tsv


@pytest.mark.parametrize("svd", ["gram", "full", "random"])
def test_worked_example(svd: str) -> None:
    # rank 2 and two experts: one direction each. 3 e1 e1' and 2 (.6, .8) e2'; the shorter second
    # direction of the first is dropped. The left directions enclose 53.1 degrees; those nearest
    # to them at 90 degrees lie 45 about the same bisector: (3, -1) and (1, 3), over sqrt(10)
    first = [[3.0, 0.0], [0.0, 1.0]]
    second = [[0.0, 1.2], [0.0, 1.6]]
    merged = Tsv(svd=svd).merge(group(first, second)) - 10
    expected = torch.tensor([[9.0, 2.0], [-3.0, 6.0]], dtype=torch.float64) / 10**0.5
    torch.testing.assert_close(merged, expected)
    scaled = Tsv(svd=svd, scale=0.5).merge(group(first, second)) - 10
    torch.testing.assert_close(scaled, expected / 2)


def test_one_expert_at_full_rank_is_that_expert() -> None:
    tau = drawn(6, 4)
    torch.testing.assert_close(Tsv().merge(group(tau)), tau + 10)


def test_experts_in_orthogonal_directions_add_up() -> None:
    left, right = (torch.linalg.qr(drawn(9, 8, seed=s)).Q for s in (1, 2))
    lengths = torch.arange(8.0, 0.0, -1.0, dtype=torch.float64)
    parts = [(left * lengths)[:, cut] @ right[:, cut].T for cut in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(Tsv().merge(group(*parts)) - 10, parts[0] + parts[1])


def test_coefficients_scale_the_task_matrices() -> None:
    first, second = drawn(5, 7, seed=1), drawn(5, 7, seed=2)
    weighed = Tsv().merge(group(first, second, coefficients=[2.0, -1.0]))
    torch.testing.assert_close(weighed, Tsv().merge(group(2 * first, -second)))


def test_more_experts_than_directions_keep_one_each() -> None:
    merged = Tsv().merge(group(*([[k + 1.0, 0.0], [0.0, 0.5]] for k in range(3)))) - 10
    # [e1 e1 e1] has the polar factor e1 [1 1 1] / sqrt(3), on both sides
    assert merged[0, 0].item() == pytest.approx((1 + 2 + 3) / 3)
    assert merged[1].abs().max().item() == pytest.approx(0, abs=1e-9)


def test_decompositions_agree() -> None:
    tensors = group(*(drawn(60, 40, seed=s) for s in range(4)))
    exact = Tsv(svd="full", density=0.05).merge(tensors)
    torch.testing.assert_close(Tsv(density=0.05).merge(tensors), exact)
    leading = group(*(drawn(60, 2, seed=s) @ drawn(2, 40, seed=s + 9) for s in range(4)))
    exact = Tsv(svd="full", density=0.05).merge(leading)
    torch.testing.assert_close(Tsv(svd="random", density=0.05).merge(leading), exact)
