"""Partners: laws through three points, groups from pairs and the greedy search, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mergewell.errors import DataError
from mergewell.partners.greedy import Coefficients, greedy, kinship
from mergewell.partners.groups import best_groups, foretold
from mergewell.partners.law import Law, fit_law, scaling

PAIRS = np.array(
    [[0.0, 0.9, 0.5, 0.4], [0.9, 0.0, 0.7, 0.2], [0.5, 0.7, 0.0, 0.8], [0.4, 0.2, 0.8, 0.0]]
)


@pytest.mark.parametrize("pull", [2.0, -2.0])
def test_three_points_give_the_law_back(pull: float) -> None:
    law = Law(0.3, pull, 0.5)
    found = fit_law([(8, law(8)), (2, law(2)), (4, law(4))])
    assert found is not None
    assert (found.limit, found.pull, found.offset) == pytest.approx((0.3, pull, 0.5))


def test_enough_is_where_one_more_changes_little() -> None:
    law = Law(0.0, 1.0, 0.0)  # 1/k: from 4 to 5 experts 0.05, from 3 to 4 0.083
    assert [law.enough(t) for t in (0.5, 0.06, 0.05, 0.049)] == [1, 4, 4, 5]


def test_points_that_straighten_or_turn_have_no_law() -> None:
    assert fit_law([(1, 1.0), (2, 2.0), (3, 3.0)]) is None
    assert fit_law([(1, 1.0), (2, 2.0), (3, 1.5)]) is None
    assert fit_law([(1, 1.0), (2, 1.0), (3, 1.0)]) == Law(1.0, 0.0, 0.0)
    with pytest.raises(DataError, match="3 different numbers"):
        fit_law([(1, 1.0), (1, 2.0), (3, 1.5)])


def test_noise_takes_the_conclusion_away() -> None:
    law = Law(0.9, -0.4, 0.0)
    exact = scaling([(k, law(k), 0.0) for k in (2, 3, 6)], tolerance=0.02)
    assert (exact.enough, exact.low, exact.high, exact.followed) == (4, 4, 4, 1.0)
    some = scaling([(k, law(k), 0.004) for k in (2, 3, 6)], tolerance=0.02)
    assert some.low is not None and some.high is not None and some.low <= 4 <= some.high
    assert some.high > some.low
    blurred = scaling([(k, law(k), 0.1) for k in (2, 3, 6)], tolerance=0.02)
    assert blurred.low is None and blurred.followed < 0.95


def test_the_best_group_of_each_size() -> None:
    assert foretold(PAIRS, (0, 1, 2)) == pytest.approx(0.7)
    found = best_groups(PAIRS)
    assert [group.members for group in found] == [(0, 1), (0, 1, 2), (0, 1, 2, 3)]
    assert [group.quality for group in found] == pytest.approx([0.9, 0.7, 3.5 / 6])
    with pytest.raises(DataError, match="the same for"):
        best_groups(np.array([[0.0, 1.0], [0.5, 0.0]]))


def test_many_experts_grow_from_the_best_pair() -> None:
    pairs = np.full((13, 13), 0.1)
    pairs[2, 5] = pairs[5, 2] = 0.9
    pairs[5, 7] = pairs[7, 5] = 0.8
    found = best_groups(pairs)
    assert [found[0].members, found[1].members] == [(2, 5), (2, 5, 7)]
    assert len(found) == 12


def test_kinship_of_mixtures_by_hand() -> None:
    # (1, 1)/2 against (1, 0) of unit vectors at right angles: 45 degrees
    assert kinship(np.eye(2), (0.5, 0.5), (1.0, 0.0)) == pytest.approx(0.5**0.5)


def test_the_search_mixes_what_is_good_and_stops() -> None:
    aim = np.array([0.5, 0.5, 0.0])

    def score(c: Coefficients) -> float:
        return -float(np.square(np.asarray(c) - aim).sum())

    found = greedy(np.eye(3), score, top=2, explore=False)
    assert found.best.coefficients == (0.5, 0.5, 0.0)
    assert found.stopped == "no better" and found.best.generation == 1
    alike = np.full((3, 3), 0.95) + 0.05 * np.eye(3)
    assert greedy(alike, score, top=2).stopped == "saturated"
    assert len(greedy(alike, score, top=2).tried) == 3
    assert greedy(alike, score, top=2, saturated=1.0).best.coefficients == (0.5, 0.5, 0.0)


def test_exploration_tries_the_least_kin() -> None:
    covariance = np.array([[1.0, 0.5, -0.5], [0.5, 1.0, 0.0], [-0.5, 0.0, 1.0]])
    scores = {(1.0, 0.0, 0.0): 3.0, (0.0, 1.0, 0.0): 2.0, (0.0, 0.0, 1.0): 1.0}
    tried = greedy(covariance, lambda c: scores.get(c, 0.0), top=2).tried
    assert [one.coefficients for one in tried[3:]] == [(0.5, 0.5, 0.0), (0.5, 0.0, 0.5)]
