"""CKA against the textbook formula on Grams, its invariances, and too few samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergewell.diagnostics.base import Evidence
from mergewell.diagnostics.cka import Cka
from mergewell.statistics.activation_cka import linear_cka


def hsic(x: Tensor, y: Tensor) -> float:
    """Return the unbiased HSIC of two linear kernels as Song et al. 2012 write it."""
    n = len(x)
    one = torch.ones(n, 1, dtype=x.dtype)
    k, m = (a @ a.T - torch.diag((a @ a.T).diagonal()) for a in (x, y))
    third = (one.T @ k @ one) * (one.T @ m @ one) / ((n - 1) * (n - 2))
    total = (k @ m).trace() + third - 2 / (n - 2) * (one.T @ k @ m @ one)
    return float(total / (n * (n - 3)))


def features(models: int, samples: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(samples, width, generator=generator)
    own = torch.randn(models, samples, width, generator=generator)
    return shared + 0.5 * own + 10.0  # features of networks have a large common mean


@pytest.mark.parametrize("shape", [(20, 7), (7, 20), (5, 5), (4, 6)])
def test_as_the_textbook_formula(shape: tuple[int, int]) -> None:
    models = features(3, *shape).double()
    found = linear_cka(models)
    for i, x in enumerate(models):
        for j, y in enumerate(models):
            expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-9)


def test_it_is_blind_to_rotations_shifts_and_scale() -> None:
    one, two = features(2, 30, 6).double()
    turn = torch.linalg.qr(features(1, 6, 6, 1)[0].double()).Q
    found = linear_cka(torch.stack([one, two, -3 * two @ turn + 5]))
    assert float(found[0, 1]) == pytest.approx(float(found[0, 2]))
    assert float(found[1, 2]) == pytest.approx(1)


def test_unrelated_features_have_none_where_the_biased_one_is_high() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 20, 200, generator=generator).double()
    centred = noise - noise.mean(1, keepdim=True)
    grams = [x @ x.T for x in centred]
    biased = (grams[0] * grams[1]).sum() / grams[0].norm() / grams[1].norm()
    assert float(biased) > 0.8 and abs(float(linear_cka(noise)[0, 1])) < 0.15


def test_the_finding_reads_the_merge_and_the_experts(plain: Evidence) -> None:
    seen = {"first": features(4, 20, 7), "last": features(4, 20, 7, 1)}
    found = Cka().measure(replace(plain, features=seen))
    assert found is not None
    cka = {name: linear_cka(f) for name, f in seen.items()}
    expected = {name: float((c[1, 3] + c[2, 3]) / 2) for name, c in cka.items()}
    assert found.by_place == pytest.approx(expected)
    assert found.value == pytest.approx(sum(expected.values()) / 2)
    assert found.predictors["cka_last"][0][1] == pytest.approx(float(cka["last"][1, 2]))
    experts = float(cka["first"][1, 2] + cka["last"][1, 2]) / 2
    assert found.predictors["cka_experts"] == pytest.approx(experts)
    assert not Cka.decides


def test_equal_models_are_alike(plain: Evidence) -> None:
    same = features(1, 20, 7).expand(4, -1, -1)
    found = Cka().measure(replace(plain, features={"b": same}))
    assert found is not None and found.value == pytest.approx(1) and found.level == "good"


def test_one_expert_is_compared_with_the_merge_alone(plain: Evidence) -> None:
    evidence = replace(plain, experts=("a",), features={"b": features(3, 20, 7)})
    found = Cka().measure(evidence)
    assert found is not None and "cka_experts" not in found.predictors


def test_too_few_samples_and_constant_features_say_why(plain: Evidence) -> None:
    few = replace(plain, features={"b": features(4, 3, 7)})
    same = torch.full((4, 6, 7), 0.1, dtype=torch.float64)
    assert bool((same - same.mean(1, keepdim=True)).any()), "rounding leaves some variation"
    flat = replace(plain, features={"b": same})
    assert Cka().measure(few) is None and "at least 4 samples" in Cka().objection(few)
    assert Cka().measure(flat) is None and "do not vary" in Cka().objection(flat)
    assert Cka().measure(plain) is None and Cka().objection(plain) == ""


def test_a_block_that_does_not_vary_is_left_out(plain: Evidence) -> None:
    seen = {"flat": torch.full((4, 9, 7), 0.1), "b": features(4, 9, 7)}
    found = Cka().measure(replace(plain, features=seen))
    assert found is not None and list(found.by_place) == ["b"]
