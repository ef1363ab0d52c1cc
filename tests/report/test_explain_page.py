"""The figures and the page of `mergewell explain`."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from mergewell.errors import OutputError
from mergewell.explain.explanation import Explanation, explain
from mergewell.labelled import cut
from mergewell.report import explain_figures as figures
from mergewell.report.explain_page import render_explain_page, write_explain_page
from mergewell.report.numbers import percent

EVIL = '"><script>alert(1)</script>'


@pytest.fixture(scope="module")
def found() -> Explanation:
    torch.manual_seed(0)

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()

    labels = torch.arange(60) % 3
    inputs = torch.randn(60, 6) + labels[:, None]
    return explain({"one": net(), EVIL: net()}, cut(inputs, labels, 30))


def test_every_way_has_a_bar_and_its_number(found: Explanation) -> None:
    variants = found.averaging.variants
    drawing = figures.way_bars(variants, title="Accuracy")
    root = ElementTree.fromstring(drawing)
    assert len([e for e in root.iter("rect") if "bar" in e.get("class", "")]) == len(variants)
    assert len([e for e in root.iter("line") if e.get("class") == "whisker"]) == 3 * len(variants)
    for variant in variants:
        assert percent(figures.value_of(variant).value) in drawing
    assert "one *" in drawing


def test_the_parts_share_one_scale(found: Explanation) -> None:
    root = ElementTree.fromstring(figures.part_bars(found.averaging.decompositions))
    bars = [e for e in root.iter("rect") if e.get("class", "").startswith("bar ")]
    widths = [float(bar.get("width", "").removesuffix("%")) for bar in bars]
    values = [
        value
        for part in found.averaging.decompositions
        for value in (part.nonlinearity, part.covariance, part.difference)
    ]
    assert widths == pytest.approx([100 * value / max(values) for value in values], abs=0.01)


def test_a_curve_has_a_dot_a_point_at_its_height(found: Explanation) -> None:
    points = found.stability.curve("magnitude", "soup", batch_norm="stored")
    curves = figures.curves_of(points, "stored")
    root = ElementTree.fromstring(figures.agreement_chart(curves, title="Scaled"))
    dots = list(root.iter("circle"))
    assert len(dots) == len(points)
    assert len([e for e in root.iter("line") if "line soup" in e.get("class", "")]) == 6
    heights = [float(dot.get("cy", "")) for dot in dots]
    whole = heights[[point.amount for point in points].index(1.0)]
    assert whole == min(heights) == 8.0  # full agreement stands at the top


def test_the_template_map_shows_every_cosine(found: Explanation) -> None:
    root = ElementTree.fromstring(figures.template_map(found.templates))
    inside = [e.text for e in root.iter("text") if "inside" in e.get("class", "")]
    assert len(inside) == 3 * 3
    assert f"{found.templates.merged.cosine[0]:.2f}".replace("-", "−") in inside


def test_the_page_holds_everything_and_asks_for_nothing(found: Explanation, tmp_path: Path) -> None:
    page = write_explain_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert page == render_explain_page(found)
    for sentence in found.sentences():
        assert sentence.replace("'", "&#39;") in page
    assert page.count('<svg class="figure') == 3 + 4
    assert "<script" not in page and page.count("alert(1)") > 3
    assert re.findall(r"https?://", page) == []
    for table in re.findall(r"<table.*?</table>", page, flags=re.DOTALL):
        assert "<caption>" in table and 'scope="' in table


def test_a_folder_that_cannot_be_written_is_named(found: Explanation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"page\.html cannot be written"):
        write_explain_page(found, tmp_path / "file" / "page.html")
