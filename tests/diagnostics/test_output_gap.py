"""Output gap, agreement and divergence from stored outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergewell.diagnostics.base import Evidence
from mergewell.diagnostics.output_gap import OutputGap

# base, a, b, merged; two samples of two classes; the ensemble's logits are (1, 0) and (0, 2)
OUTPUTS = torch.tensor(
    [
        [[9.0, 9.0], [9.0, 9.0]],
        [[2.0, 0.0], [0.0, 2.0]],
        [[0.0, 0.0], [0.0, 2.0]],
        [[0.0, 1.0], [0.0, 2.0]],
    ]
)


def test_the_gap_follows_from_the_outputs(plain: Evidence) -> None:
    found = OutputGap().measure(replace(plain, outputs=OUTPUTS))
    assert found is not None and found.value == pytest.approx((2 / 5) ** 0.5)
    assert set(found.predictors) == {"output_gap"}, "features have no answers"
    measured = OutputGap().measure(replace(plain, outputs=OUTPUTS, output_gap=0.1))
    assert measured is not None and measured.value == 0.1


def test_logits_have_agreement_and_divergence(plain: Evidence) -> None:
    found = OutputGap().measure(replace(plain, outputs=OUTPUTS, logits=True))
    assert found is not None
    assert found.predictors["output_agreement"] == 0.5 and "50 % of its answers" in found.verdict
    # the first sample's probabilities are (p, 1 - p) and swapped, log p / (1 - p) = 1
    p = torch.tensor(1.0).sigmoid().item()
    assert found.predictors["output_kl"] == pytest.approx((2 * p - 1) / 2, rel=1e-5)


def test_the_ensemble_is_weighted(plain: Evidence) -> None:
    outputs = torch.stack([OUTPUTS[0], OUTPUTS[1], OUTPUTS[2], OUTPUTS[1]])
    evidence = replace(plain, outputs=outputs, logits=True, coefficients=(1.0, 0.0))
    found = OutputGap().measure(evidence)
    assert found is not None and found.value == 0
    assert found.predictors["output_kl"] == pytest.approx(0, abs=1e-9)


def test_nothing_run_is_nothing_said(plain: Evidence) -> None:
    assert OutputGap().measure(plain) is None
    zero = OutputGap().measure(replace(plain, outputs=torch.zeros(4, 2, 2)))
    assert zero is not None and zero.value == 0
