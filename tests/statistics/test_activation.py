"""Statistics of blocks' outputs: by hand, by brute force, in parts."""

import pytest
import torch

from mergewell.errors import DataError
from mergewell.statistics.activation import BlockOutputs
from mergewell.statistics.activation_cka import linear_cka
from mergewell.statistics.activation_drift import ActivationDrift, Sides
from mergewell.statistics.activation_features import ActivationFeatures, SampleFeatures
from mergewell.statistics.activation_gram import ActivationGram, LayerInputs
from mergewell.statistics.activation_moments import ActivationMoments


def test_rows_and_means_leave_padding_out() -> None:
    hidden = torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [100, 100]]])
    keep = torch.tensor([[True, True], [True, False]])
    laid = BlockOutputs.of([hidden], node_dim=-1, keep=keep)
    assert laid.rows[0].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert laid.pooled.tolist() == [[[2, 3], [5, 6]]]


def test_channels_come_first_in_images() -> None:
    image = torch.arange(8.0).reshape(1, 2, 2, 2)
    laid = BlockOutputs.of([image, image], node_dim=1)
    assert laid.rows[1].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert laid.pooled.tolist() == [[[1.5, 5.5]]] * 2


def test_outputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="all models must give one shape"):
        BlockOutputs.of([torch.ones(2, 3), torch.ones(2, 4)], node_dim=-1)
    with pytest.raises(DataError, match="all models must give one shape"):
        BlockOutputs.of([torch.ones(2)], node_dim=-1)
    with pytest.raises(DataError, match="mask"):
        BlockOutputs.of([torch.ones(2, 3, 4)], node_dim=-1, keep=torch.ones(2, 2).bool())


def two_models(samples: int, seed: int = 0) -> BlockOutputs:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(samples, 3, 5, generator=generator) + 7
    second = first + 0.5 * torch.randn(samples, 3, 5, generator=generator)
    return BlockOutputs.of([first, second], node_dim=-1)


def test_moments_of_parts_are_those_of_the_whole() -> None:
    parts = [two_models(4, seed) for seed in range(3)]
    statistic, state = ActivationMoments(), ActivationMoments().start()
    for part in parts:
        state = statistic.update(state, part)
    value = statistic.value(state)
    rows = torch.cat([part.rows[1] for part in parts]).double()
    torch.testing.assert_close(value["mean"][1], rows.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(value["variance"][1], rows.var(0, correction=0), rtol=1e-4, atol=0)
    with pytest.raises(DataError):
        statistic.value({})


def slow_hsic(left: torch.Tensor, right: torch.Tensor) -> float:
    """Song et al. 2012 as a sum over 4-tuples of distinct samples, the definition of HSIC_1."""
    n = len(left)
    total = count = 0.0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        k = float(left[i, j])
                        total += k * float(right[i, j] + right[q, r] - 2 * right[i, q])
                        count += 1
    return total / count


def test_cka_is_its_definition() -> None:
    pooled = two_models(6).pooled
    kernels = pooled.double() @ pooled.double().mT  # not centred: the estimate does not need it
    one, both, other = (slow_hsic(kernels[i], kernels[j]) for i, j in ((0, 0), (0, 1), (1, 1)))
    assert one > 0 and other > 0
    wanted = max(-1.0, min(1.0, both / (one * other) ** 0.5))
    assert float(linear_cka(pooled)[0, 1]) == pytest.approx(wanted, rel=1e-6)


def test_cka_of_equal_scaled_rotated_and_unrelated_features() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    others = [x, 3 * x + 1, x @ turn, torch.randn(200, 6, generator=generator), torch.ones(200, 6)]
    cka = linear_cka(torch.stack(others))
    assert cka[0, :3].tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert abs(float(cka[0, 3])) < 0.05
    assert bool(cka[4].isnan().all())
    with pytest.raises(DataError, match="at least 4 samples"):
        linear_cka(torch.stack(others)[:, :3])


def test_drift_by_hand_and_joined() -> None:
    base, one, two, merged = (torch.tensor(row) for row in ([3.0, 4], [3.0, 5], [6.0, 8], [4.5, 6]))
    statistic = ActivationDrift()
    state = statistic.update({}, Sides([base, one, two, merged], [0.5, 0.5]))
    value = statistic.value(state)
    assert value["experts"].tolist() == pytest.approx([0.2, 1.0])
    # the ensemble is (4.5, 6.5)
    assert float(value["merged"]) == pytest.approx(0.5 / (4.5**2 + 6.5**2) ** 0.5)
    twice = statistic.value(statistic.join(state, state))
    assert twice["experts"].tolist() == value["experts"].tolist()
    same = statistic.value(statistic.update({}, Sides([base, two, two, two], [0.3, 0.7])))
    assert float(same["merged"]) == 0


def test_features_come_back_in_the_order_of_the_data() -> None:
    statistic = ActivationFeatures()
    late = statistic.update({}, SampleFeatures(torch.tensor([[[3.0], [4]]]), 2))
    early = statistic.update({}, SampleFeatures(torch.tensor([[[1.0], [2]]]), 0))
    value = statistic.value(statistic.join(late, early))
    assert value["features"].flatten().tolist() == [1, 2, 3, 4]
    assert statistic.join(late, {}) is late


def test_gram_leaves_padding_out() -> None:
    inputs = torch.tensor([[[1.0, 2], [9, 9]]])
    statistic = ActivationGram()
    state = statistic.update({}, LayerInputs(inputs, torch.tensor([[True, False]])))
    assert state["gram"].tolist() == [[1, 2], [2, 4]] and float(state["count"]) == 1
    whole = statistic.update(state, LayerInputs(inputs))
    assert whole["gram"].tolist() == [[83, 85], [85, 89]] and float(whole["count"]) == 3
