"""The predictor: trees by hand, bytes and back, and what it says of planted cases."""

import numpy as np
import pytest

from mergewell.prediction.forest import Forest, rows_of
from mergewell.prediction.predictor import Predictor, shipped, with_means


def stump(at: float, low: float, high: float, start: float = 0.0) -> Forest:
    """Return one tree of one question of feature 1; what is missing goes right."""
    return Forest(
        np.array([start]), np.array([0], np.int32), np.array([1, -1, -1], np.int32),
        np.array([at, 0, 0]), np.array([False] * 3), np.array([1, 0, 0], np.int32),
        np.array([2, 0, 0], np.int32), np.array([0, low, high]),
    )  # fmt: skip


def test_a_tree_by_hand() -> None:
    rows = rows_of(("a", "b"), [{"a": 1, "b": 0.5}, {"b": 0.6}, {"a": 2}])
    assert stump(0.5, -1.0, 2.0, 10.0)(rows).tolist() == [9, 12, 12]


def toy() -> Predictor:
    quantiles = {"expert": (-1, 2), "mean of 2": (-0.5, 0.5), "mean of 3 to 4": (-1, 1)}
    facts = {"quantiles": quantiles, "alarms": {"b": [1, 0.5]}}
    return Predictor(
        "weights", ("a", "b"), stump(0.5, 0.4, 0.8), stump(0.5, 0.1, 0.2),
        np.array([0.0, 0.0]), np.array([1.0, 1.0]), facts,
    )  # fmt: skip


def test_intervals_and_what_lies_outside() -> None:
    found = toy()([{"a": 0.1, "b": 0.2}, {"a": 3.0, "b": 0.7}])
    assert (found.mean.value, found.mean.low, found.mean.high) == pytest.approx((0.6, 0.525, 0.675))
    assert found.experts[1].high == pytest.approx(0.8 + 2 * 0.2)
    assert found.alarms == ((), ("b",))
    assert found.outside == ("a",)


def test_bytes_and_back() -> None:
    again = Predictor.from_bytes(toy().to_bytes())
    rows = [{"a": 0.1, "b": 0.2}, {"b": 0.7}]
    assert again(rows) == toy()(rows)
    assert again.to_bytes() == toy().to_bytes()


@pytest.mark.parametrize("budget", ["weights", "unlabelled", "labelled"])
def test_what_is_shipped_is_ordered_as_anyone_would(budget: str) -> None:
    predictor = shipped(budget)  # type: ignore[arg-type]
    facts = predictor.facts
    assert facts["merges"] >= 1000
    assert {"expert", "mean of 2", "mean of 3 to 4", "mean of 5 to 8"} == {*facts["quantiles"]}
    assert all(low < 0 < high for low, high in facts["quantiles"].values())
    near = {"w_away_base": 0.01, "w_kept": 1.0, "u_cka_own": 1.0, "u_kl_own": 0.01}
    near |= {"u_agreement_own": 1.0, "u_held_mix": 1.0, "u_cosine": 1.0}
    far = {"w_away_base": 0.9, "w_kept": 0.1, "u_cka_own": 0.1, "u_kl_own": 4.0}
    far |= {"u_agreement_own": 0.1, "u_held_mix": 0.2, "u_cosine": 0.1}
    rest = {"w_experts": 2.0, "w_norm": 0.1}
    kept, lost = (predictor([rest | one, rest | one]).mean.value for one in (near, far))
    assert kept > lost + 0.05


def test_means_stand_beside_each_expert() -> None:
    found = with_means([{"u_conf": 0.5, "w_norm": 1.0}, {"u_conf": 1.0}])
    assert found[1] == {"u_conf": 1.0, "mean_u_conf": 0.75}
