import pytest
import torch

from mergewell.methods.sce import Sce
from mergewell.methods.ties import Ties
from mergewell.tensor_group import CHUNK, TensorGroup


def group(*task_vectors: list[float], coefficients: list[float] | None = None) -> TensorGroup:
    base = torch.full((len(task_vectors[0]),), 10.0)
    experts = tuple(base + torch.tensor(tau) for tau in task_vectors)
    return TensorGroup("w", experts, torch.tensor(coefficients or [1.0] * len(experts)), base)


def test_worked_example() -> None:
    # variances 1, 4, 0, 0.25; of the 3 that vary floor(0.7 * 3) = 2 are kept: the first two
    tensors = group([3.0, 2.0, 5.0, 1.0], [1.0, -2.0, 5.0, 0.0])
    # mean squares 13/4 and 5/4: weights 13/18 and 5/18; the draw at the second elects plus
    expected = [10 + (3 * 13 + 1 * 5) / 18, 12.0, 10.0, 10.0]
    assert Sce(density=0.7).merge(tensors).tolist() == pytest.approx(expected)


def test_coefficients_multiply_the_weights() -> None:
    tensors = group([3.0, 0.0], [1.0, 0.0], coefficients=[1.0, 9.0])
    # weights 0.9 and 0.1, times 1 and 9: both 0.9
    assert Sce().merge(tensors).tolist() == pytest.approx([12.0, 10.0])


def test_small_changes_weigh_the_same_where_asked() -> None:
    tensors = group([0.25, 0.0], [0.5, 0.0])
    assert Sce(least=1.0).merge(tensors).tolist() == [10.375, 10.0]
    assert Sce().merge(tensors).tolist() == pytest.approx([10.45, 10.0])


def test_equal_energies_reduce_to_ties_without_trimming() -> None:
    torch.manual_seed(0)
    tau = torch.randn(50)
    signs = [torch.where(torch.randn(50) > 0, 1.0, -1.0) for _ in range(3)]
    tensors = group(*[(tau * sign).tolist() for sign in signs])
    torch.testing.assert_close(Sce().merge(tensors), Ties(density=1.0).merge(tensors))


def test_nothing_is_selected_where_nothing_varies_enough() -> None:
    tensors = group([3.0, 2.0], [3.0, 1.0])
    assert Sce(density=0.5).merge(tensors).tolist() == [10.0, 10.0]  # floor(0.5 * 1) = 0


def test_blocks_with_ties_select_the_same_entries_as_the_whole() -> None:
    torch.manual_seed(0)
    size = 2 * CHUNK + 100
    taus = [torch.round(torch.randn(size) * 8) / 8 for _ in range(3)]
    base = torch.zeros(size)
    whole = TensorGroup("w", tuple(taus), torch.ones(3), base)
    method = Sce(density=0.3)
    (statistic,) = method.statistics()
    value = statistic.measure([whole])["w"]
    assert "ties_before" in value, "the example must have ties to cut"
    mask = statistic.mask(whole, value)
    assert mask is not None
    variances = torch.stack(taus).var(0, unbiased=False)
    assert int(mask.sum()) == int(0.3 * int((variances > 1e-9).sum()))
    parts = [
        method.merge(
            TensorGroup(
                "w", tuple(t[s : s + CHUNK] for t in taus), torch.ones(3), base[s : s + CHUNK],
                offset=s, numel=size, statistics={statistic: value},
            )
        )
        for s in range(0, size, CHUNK)
    ]  # fmt: skip
    assert torch.equal(torch.cat(parts), method.merge(whole))
