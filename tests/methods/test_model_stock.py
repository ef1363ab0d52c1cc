import pytest
import torch

from mergewell.methods.model_stock import ModelStock
from mergewell.methods.wise_ft import WiseFt
from mergewell.tensor_group import TensorGroup


def group(*task_vectors: list) -> TensorGroup:
    taus = [torch.tensor(tau, dtype=torch.float64) for tau in task_vectors]
    base = torch.full_like(taus[0], 10.0)
    ones = torch.ones(len(taus), dtype=torch.float64)
    return TensorGroup("w", tuple(base + tau for tau in taus), ones, base)


def test_worked_example() -> None:
    # cosine 0.6, t = 2 * 0.6 / 1.6 = 0.75, mean task vector [0.8, 0.4]
    tensors = group([1.0, 0.0], [0.6, 0.8])
    assert ModelStock().merge(tensors).tolist() == pytest.approx([10.6, 10.3])
    # three with cosines 0.6, 0, 0.8: c = 1.4 / 3, t = 1.4 / (1 + 2 * 1.4 / 3)
    three = group([1.0, 0.0], [0.6, 0.8], [0.0, 1.0])
    t = 1.4 / (1 + 2.8 / 3)
    expected = [10 + t * 1.6 / 3, 10 + t * 1.8 / 3]
    assert ModelStock().merge(three).tolist() == pytest.approx(expected)


def test_rows_have_a_ratio_each() -> None:
    tensors = group([[1.0, 0.0], [2.0, 0.0]], [[0.6, 0.8], [2.0, 0.0]])
    merged = ModelStock(scope="row").merge(tensors)
    expected = torch.tensor([[10.6, 10.3], [12.0, 10.0]], dtype=torch.float64)
    torch.testing.assert_close(merged, expected)


def test_orthogonal_and_opposed_changes_give_the_base() -> None:
    for scope in ("tensor", "row"):
        for tensors in (group([1.0, 0.0], [0.0, 2.0]), group([1.0, 0.0], [-3.0, 0.0])):
            assert ModelStock(scope=scope).merge(tensors).tolist() == [10.0, 10.0]


def test_parallel_changes_reduce_to_their_average() -> None:
    tensors = group([1.0, 2.0], [3.0, 6.0])
    torch.testing.assert_close(ModelStock().merge(tensors), WiseFt(t=1.0).merge(tensors))
