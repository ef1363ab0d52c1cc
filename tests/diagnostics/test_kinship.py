"""Kinship by hand, against numpy's correlation, and where it is not defined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mergewell.diagnostics.base import Evidence
from mergewell.diagnostics.kinship import Kinship, correlations


def evidence_of(plain: Evidence, base: Tensor, *taus: Tensor) -> Evidence:
    vectors = torch.stack([base, *taus]).double()
    return replace(
        plain,
        experts=tuple("abc"[: len(taus)]),
        products={"w": vectors @ vectors.T},
        sums={"w": vectors[1:].sum(1)},
        sizes={"w": len(base)},
    )


def test_the_cosine_keeps_its_sign_and_pearson_is_something_else(plain: Evidence) -> None:
    # (0.3, 0.4) and (0, -1): cosine -0.8; centred (-.05, .05) and (.5, -.5): correlation -1
    found = Kinship().measure(
        replace(plain, sums={"w": torch.tensor([0.7, -1.0]).double()}, sizes={"w": 2})
    )
    assert found is not None
    assert found.value == found.by_place["w"] == pytest.approx(-1)
    assert found.predictors["kinship_cosine"] == [
        pytest.approx([1, -0.8]),
        pytest.approx([-0.8, 1]),
    ]
    # squared distance 0.25 + 1 + 2 * 0.4
    assert found.predictors["kinship_distance"][0][1] == pytest.approx(2.05**0.5)
    assert found.level == "poor" and "opposite" in found.advice and not Kinship.decides


def test_correlations_over_tensors_are_those_of_the_flattened_model(plain: Evidence) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, n, generator=generator).double() + 1 for n in (30, 50)]
    evidence = replace(
        plain,
        experts=("a", "b", "c"),
        products={str(i): p @ p.T for i, p in enumerate(parts)},
        sums={str(i): p[1:].sum(1) for i, p in enumerate(parts)},
        sizes={"0": 30, "1": 50},
    )
    found = Kinship().measure(evidence)
    assert found is not None
    whole = torch.cat(parts, 1)[1:]
    assert np.allclose(found.predictors["kinship_pearson"], np.corrcoef(whole.numpy()))
    one = np.corrcoef(parts[1][1:].numpy())
    assert found.by_place["1"] == pytest.approx((one.sum() - 3) / 6)


def test_equal_experts_are_nearly_one_model(plain: Evidence) -> None:
    tau = torch.tensor([1.0, 2.0, 4.0])
    found = Kinship().measure(evidence_of(plain, torch.ones(3), tau, tau))
    assert found is not None and found.value == pytest.approx(1) and "one model" in found.advice


def test_what_cannot_be_compared_says_why(plain: Evidence) -> None:
    one = evidence_of(plain, torch.ones(3), torch.tensor([1.0, 2.0, 4.0]))
    still = evidence_of(plain, torch.ones(3), torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3))
    for evidence, reason in ((one, "only one"), (still, "fewer than two experts moved")):
        assert Kinship().measure(evidence) is None
        assert reason in Kinship().objection(evidence)
    assert Kinship().measure(plain) is None and Kinship().objection(plain) == ""


def test_a_constant_change_has_no_correlation() -> None:
    vectors = torch.tensor([[0.3, 0.3, 0.3], [1.0, 2.0, 4.0]], dtype=torch.float64)
    assert float(vectors[0] @ vectors[0] - vectors[0].sum() ** 2 / 3) > 0, "rounding leaves some"
    found = correlations(vectors @ vectors.T, vectors.sum(1), 3)
    assert found.isnan().tolist() == [[True, True], [True, False]]
