"""Losses, curvature, gradients and earlier checkpoints on a network of four numbers."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor, nn

from mergewell.advise.bound import Evidence
from mergewell.advise.early import LAST, choose
from mergewell.advise.measure import informed, measure
from mergewell.advise.settings import Known, Sourced
from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError

ONE = torch.ones(4, 1)


def weights(value: float) -> dict[str, Tensor]:
    """Logits (value, 0) for the input 1: class 0 is right with 1 / (1 + exp(-value))."""
    return {"weight": torch.tensor([[value], [0.0]])}


def net() -> nn.Module:
    return nn.Linear(1, 2, bias=False)


def loss(value: float) -> float:
    return log(1 + exp(-value))


def task(expert: int | None, *, labelled: bool = True) -> LearningTask:
    labels = [torch.zeros(2, dtype=torch.int64)] * 2 if labelled else ()
    return LearningTask(expert, ONE.split(2), labels)


def test_losses_and_gradients_by_labels() -> None:
    told = measure(
        [task(0), task(1)], [weights(2), weights(3)], weights(0), weights(1),
        [{5: weights(1.5)}, {}], net,
    )  # fmt: skip
    assert told.own == pytest.approx([loss(2), loss(3)])
    assert told.base == pytest.approx([log(2)] * 2)
    assert told.merged == pytest.approx([loss(1)] * 2)
    assert told.early == [{5: pytest.approx(loss(1.5))}, {}]
    wrong = 1 / (1 + exp(2))  # both logits' gradients are this wide
    assert told.gradients is not None
    assert told.gradients[0] == pytest.approx(2 * wrong**2)
    assert told.source == "labelled inputs"


def test_without_labels_an_expert_is_its_own_teacher() -> None:
    told = measure(
        [task(None, labelled=False)], [weights(2)], weights(0), weights(1), [{}], net
    )  # fmt: skip
    right = 1 / (1 + exp(-2))
    assert told.own == pytest.approx([-right * log(right) - (1 - right) * log(1 - right)])
    assert told.base == pytest.approx([log(2)]) and told.gradients is None


def test_curvature_is_twice_the_fall_over_the_squared_length() -> None:
    products = torch.diag(torch.tensor([1.0, 4.0]))
    told = measure([task(0)], [weights(2)], weights(0), weights(1), [{}], net)
    found = informed(Evidence(["a"], [Known({})], products), told)
    assert found.curvatures is not None and found.merged is not None
    assert found.curvatures[0].value == pytest.approx(2 * (log(2) - loss(2)) / 4)
    logged = Known({"start_loss": Sourced(3.0, "s"), "loss": Sourced(1.0, "s")})
    from_log = informed(Evidence(["a"], [logged], products), None)
    assert from_log.curvatures == [Sourced(1.0, "training loss in s")]
    worse = Known({"start_loss": Sourced(1.0, "s"), "loss": Sourced(3.0, "s")})
    assert informed(Evidence(["a"], [worse], products), None).curvatures is None


def test_labels_that_do_not_fit() -> None:
    odd = LearningTask(0, [ONE], [torch.full((4,), 2)])
    with pytest.raises(DataError, match="A label is 2, but the model has 2 classes"):
        measure([odd], [weights(2)], weights(0), weights(1), [{}], net)
    with pytest.raises(DataError, match="Expert 2 has no inputs"):
        measure([task(0)], [weights(2)] * 2, weights(0), weights(1), [{}, {}], net)


def test_the_best_early_checkpoint_by_hand() -> None:
    # experts at 4 and 0 on a line, a checkpoint of the first at 2: V falls from 4 to 1
    taus = torch.tensor([4.0, 0.0, 2.0])
    products = taus[:, None] * taus[None]
    bends, own = [0.5, 0.5], [0.1, 0.1]
    (kept,) = choose(["a", "b"], products, [{9: 2}, {}], curvatures=bends, losses=own,
                     early=[{9: 0.2}, {}])  # fmt: skip
    early, last = kept.candidates
    assert (early.step, last.step) == (9, LAST)
    assert (early.distance, early.apart) == (0.25, 0.25)
    assert early.total == pytest.approx((0.3 + 0.25 * 2) / 2)
    assert last.total == pytest.approx((0.2 + 0.25 * 8) / 2)
    assert kept.best is early
    (dear,) = choose(["a", "b"], products, [{9: 2}, {}], curvatures=bends, losses=own,
                     early=[{9: 2.0}, {}])  # fmt: skip
    assert dear.best is not None and dear.best.step == LAST
    (blind,) = choose(["a", "b"], products, [{9: 2}, {}], curvatures=None, losses=None, early=None)
    assert blind.best is None and blind.candidates[0].apart == 0.25
