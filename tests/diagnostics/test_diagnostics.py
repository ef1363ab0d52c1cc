"""Diagnostics on evidence made by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from mergewell.diagnostics.base import DIAGNOSTICS, Evidence, level_of
from mergewell.diagnostics.m_loss import MLoss, layer_verdict
from mergewell.diagnostics.output_gap import OutputGap
from mergewell.diagnostics.sign_conflict import SignConflict
from mergewell.diagnostics.task_vectors import TaskVectors


@dataclass(frozen=True)
class Layer:
    layer: str
    relative: float
    kind: str = "activation"


# base (3, 4); task vectors (0.3, 0.4) and (0, -1): norms 5, 0.5, 1; cosine -0.8
PRODUCTS = torch.tensor([[25.0, 2.5, -4.0], [2.5, 0.25, -0.4], [-4.0, -0.4, 1.0]])
# added up: (0.3, -0.6), mass 0.9 of 1.7; only the second entries oppose: 0.4 of 0.4
EVIDENCE = Evidence(
    experts=("a", "b"),
    products={"w": PRODUCTS.double()},
    conflict_mass={"w": torch.tensor([0.9, 1.7])},
    conflict_pairs={"w": torch.tensor([[[0.0, 0.4], [0.4, 0.0]], [[0.25, 0.4], [0.4, 1.0]]])},
)


def test_task_vectors_norms_dispersion_and_cosines() -> None:
    finding = TaskVectors().measure(EVIDENCE)
    assert finding.predictors["relative_norm"] == pytest.approx({"a": 0.1, "b": 0.2})
    assert finding.value == pytest.approx(2.0)
    assert finding.predictors["cosine"] == [pytest.approx([1, -0.8]), pytest.approx([-0.8, 1])]
    assert "b most" in finding.verdict and "-0.80" in finding.verdict


def test_tensors_that_nobody_moved_do_not_drown_the_norm() -> None:
    still = torch.zeros(3, 3, dtype=torch.float64)
    still[0, 0] = 1e12
    finding = TaskVectors().measure(replace(EVIDENCE, products={**EVIDENCE.products, "v": still}))
    assert finding.predictors["relative_norm"] == pytest.approx({"a": 0.1, "b": 0.2})


def test_an_expert_that_is_the_base_is_noticed() -> None:
    products = PRODUCTS.double().clone()
    products[1, :] = products[:, 1] = 0
    finding = TaskVectors().measure(replace(EVIDENCE, products={"w": products}))
    assert finding.level == "poor" and "a did not move at all" in finding.advice


def test_sign_conflict_mass_and_opposed_pairs() -> None:
    finding = SignConflict().measure(EVIDENCE)
    assert finding.value == pytest.approx(1 - 0.9 / 1.7)
    assert finding.predictors["opposed"] == [pytest.approx([0, 1]), pytest.approx([1, 0])]
    assert finding.level == "poor", "unrelated task vectors would cancel 29 %"


def test_m_loss_speaks_of_the_median_and_the_worst_layer() -> None:
    layers = [Layer("first", 0.01), Layer("second", 0.03), Layer("third", 0.3)]
    finding = MLoss().measure(replace(EVIDENCE, layers=layers))
    assert finding is not None
    assert (finding.value, finding.where, finding.level) == (0.03, "third", "good")
    assert "third" in finding.advice
    whole = [Layer("blocks.0", 0.5, "block"), Layer("(output)", 0.9, "output")]
    assert MLoss().measure(replace(EVIDENCE, layers=[*layers, *whole])) == finding
    alone = MLoss().measure(replace(EVIDENCE, layers=whole))
    assert alone is not None and alone.where == "(output)"
    assert MLoss().measure(EVIDENCE) is None
    assert layer_verdict(0.0) == "merging and ensembling are the same here"
    assert layer_verdict(0.3) == "merging and ensembling part here"


def test_the_output_gap_needs_data() -> None:
    finding = OutputGap().measure(replace(EVIDENCE, output_gap=0.5))
    assert finding is not None and finding.level == "poor" and "50 %" in finding.verdict
    assert OutputGap().measure(EVIDENCE) is None


def test_levels_have_sharp_edges() -> None:
    assert [level_of(v, good=0.1, poor=0.2) for v in (0.09, 0.1, 0.2)] == ["good", "fair", "poor"]


def test_every_diagnostic_is_found_by_its_file_name() -> None:
    assert set(DIAGNOSTICS.names()) >= {"m_loss", "output_gap", "sign_conflict", "task_vectors"}
    for name in DIAGNOSTICS.names():
        finding = DIAGNOSTICS.build(name, {}).measure(replace(EVIDENCE, output_gap=0.1))
        assert finding is None or finding.verdict.endswith(".")
