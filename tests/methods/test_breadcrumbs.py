import pytest
import torch
from pydantic import ValidationError

from mergewell.methods.breadcrumbs import Breadcrumbs
from mergewell.methods.task_arithmetic import TaskArithmetic
from mergewell.methods.ties import Ties
from mergewell.tensor_group import CHUNK, TensorGroup


def group(*task_vectors: list[float] | list[list[float]]) -> TensorGroup:
    taus = [torch.tensor(tau) for tau in task_vectors]
    base = torch.full_like(taus[0], 10.0)
    return TensorGroup("w", tuple(base + tau for tau in taus), torch.ones(len(taus)), base)


def test_worked_example() -> None:
    # of 5 entries 1 outlier goes (-9), then 2 are kept: 4 and -3
    tensors = group([4.0, -9.0, 1.0, -3.0, 2.0])
    merged = Breadcrumbs(density=0.4, gamma=0.2).merge(tensors)
    assert merged.tolist() == [14.0, 10.0, 10.0, 7.0, 10.0]


def test_rows_are_counted_by_themselves() -> None:
    tensors = group([[4.0, 3.0, 2.0, 1.0], [40.0, 30.0, 20.0, -10.0]])
    merged = Breadcrumbs(density=0.5, gamma=0.25, trim_scope="row").merge(tensors)
    assert merged.tolist() == [[10, 13, 12, 10], [10, 40, 30, 10]]
    whole = Breadcrumbs(density=0.5, gamma=0.25).merge(tensors)
    assert whole.tolist() == [[14, 13, 10, 10], [10, 10, 30, 0]]  # 40 and 30 go, the next 4 stay


def test_gamma_zero_removes_no_outlier_and_reduces_to_trimmed_task_arithmetic() -> None:
    tensors = group([4.0, -9.0, 1.0, -3.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    trimmed = Ties(density=0.4, combine="sum").merge(tensors)
    assert torch.equal(Breadcrumbs(density=0.4, gamma=0.0).merge(tensors), trimmed)
    plain = TaskArithmetic(scale=1.0).merge(tensors)
    assert torch.equal(Breadcrumbs(density=1.0).merge(tensors), plain)


def test_fewer_outliers_go_where_the_density_would_not_be_left() -> None:
    tensors = group([5.0, 4.0, 3.0, 2.0])
    assert Breadcrumbs(density=0.75, gamma=0.5).merge(tensors).tolist() == [10, 14, 13, 12]


def test_rescaling_restores_the_l1_norm() -> None:
    tensors = group([4.0, -9.0, 1.0, -3.0, 3.0])
    merged = Breadcrumbs(density=0.4, gamma=0.2, rescale="norm").merge(tensors)
    torch.testing.assert_close(merged, torch.tensor([10 + 4 * 20 / 7, 10, 10, 10 - 3 * 20 / 7, 10]))


def test_blocks_with_ties_keep_the_same_entries_as_the_whole() -> None:
    torch.manual_seed(0)
    base = torch.zeros(2 * CHUNK + 100)
    tau = torch.round(torch.randn(base.shape) * 20) / 20
    tensors = TensorGroup("w", (tau,), torch.ones(1), base)
    method = Breadcrumbs(density=0.3, gamma=0.1)
    whole = method.merge(tensors)
    order = tau.abs().sort(descending=True, stable=True).indices
    top, kept = int(0.1 * tau.numel()), int(0.3 * tau.numel())
    expected = torch.zeros_like(tau)
    expected[order[top : top + kept]] = tau[order[top : top + kept]]
    assert torch.equal(whole, expected)
    (statistic,) = method.statistics()
    value = statistic.measure([tensors])["w"]
    assert "ties_before" in value, "the example must have ties to cut"
    parts = [
        method.merge(
            TensorGroup(
                "w", (tau[s : s + CHUNK],), torch.ones(1), base[s : s + CHUNK],
                offset=s, numel=tau.numel(), statistics={statistic: value},
            )
        )
        for s in range(0, tau.numel(), CHUNK)
    ]  # fmt: skip
    assert torch.equal(torch.cat(parts), whole)


def test_each_expert_may_have_its_own_gamma() -> None:
    tensors = group([4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0])
    merged = Breadcrumbs(density=0.25, gamma=(0.0, 0.5)).merge(tensors)
    assert merged.tolist() == [14, 12, 10, 10]


def test_restoring_norms_of_rows_is_refused() -> None:
    with pytest.raises(ValidationError, match="trim_scope"):
        Breadcrumbs(rescale="norm", trim_scope="row")
