from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from mergewell.report import figures, layer_figures
from mergewell.report.layer_figures import NodeGroup
from mergewell.report.numbers import fine_percent, fixed, percent
from mergewell.report.results import Cutoffs, LayerMLoss, Results, validated

NAMES = ("a", "b")


def layer(name: str, relative: float, *node: float) -> LayerMLoss:
    held = node or (relative,)
    return LayerMLoss(
        layer=name, activation="relu", nodes=len(held), absolute=1.0, relative=relative, node=held
    )


def node_map(layers: list[LayerMLoss], *, many: bool = False) -> str:
    return layer_figures.node_map(layers, layer_figures.shade_range(layers), many=many)


def parsed(drawing: str) -> Element:
    root = ElementTree.fromstring(drawing)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert root.get("width") == "100%"
    return root


def marked(root: Element, name: str) -> list[Element]:
    return [one for one in root.iter() if name in (one.get("class") or "").split()]


def width(bar: Element) -> float:
    shown = bar.get("width", "")
    assert shown.endswith("%")
    return float(shown[:-1]) / 100


def titles(root: Element) -> list[str]:
    return [one.text or "" for one in root.iter("title")]


@pytest.fixture
def results(example: dict[str, Any]) -> Results:
    return validated(Results, example, where="example")


def test_series_stand_in_drawing_order_with_their_mean(results: Results) -> None:
    series = figures.accuracy_series(results, "ties")
    names = [(one.name, one.kind) for one in series]
    assert names == [
        ("base", "base"),
        ("average", "merge"),
        ("task_arithmetic", "merge"),
        ("ties", "best"),
        ("ensemble", "ensemble"),
        ("experts", "expert"),
    ]
    assert series[0].values["mean"] == pytest.approx((0.812 + 0.706 + 0.571 + 0.488) / 4)


def test_accuracy_bars_are_as_long_as_their_values(results: Results) -> None:
    series = figures.accuracy_series(results, "ties")
    root = parsed(figures.accuracy_bars(series, "kannada", title="kannada"))
    bars = marked(root, "bar")
    assert [width(bar) for bar in bars] == pytest.approx(
        [one.values["kannada"] for one in series], abs=1e-6
    )
    assert len({bar.get("class") for bar in bars}) == 5
    for one, told in zip(series, titles(root), strict=True):
        assert one.name in told and percent(one.values["kannada"]) in told
    shown = [text.text for text in marked(root, "value")]
    assert shown == [percent(one.values["kannada"]) for one in series]


def test_whiskers_reach_from_low_to_high(results: Results) -> None:
    series = figures.accuracy_series(results, "ties")
    root = parsed(figures.accuracy_bars(series[:1], "mnist", title="mnist"))
    line = marked(root, "whisker")[0]
    assert (line.get("x1"), line.get("x2")) == ("79.4%", "82.64%")


def test_without_intervals_there_are_no_whiskers(example: dict[str, Any]) -> None:
    del example["intervals"]
    series = figures.accuracy_series(validated(Results, example, where="example"), None)
    assert not marked(parsed(figures.accuracy_bars(series, "mnist", title="mnist")), "whisker")


def test_layer_bars_are_proportional_and_keep_the_order() -> None:
    layers = [layer("one", 0.03), layer("two", 0.4), layer("three", 0.1), layer("four", 0.0)]
    root = parsed(layer_figures.layer_bars(layers, Cutoffs()))
    bars = marked(root, "bar")
    assert [width(bar) for bar in bars] == pytest.approx([0.075, 1.0, 0.25, 0.0])
    assert [bar.get("class") for bar in bars] == ["bar good", "bar poor", "bar fair", "bar good"]
    assert [one.get("class") for one in marked(root, "mark")] == [
        "mark good",
        "mark poor",
        "mark fair",
        "mark good",
    ]
    assert [text.text for text in marked(root, "value")] == [percent(x.relative) for x in layers]
    assert [told.partition(" ")[0] for told in titles(root)] == ["one", "two", "three", "four"]


def test_levels_differ_in_shape_and_not_in_colour_alone() -> None:
    layers = [layer("one", 0.03), layer("two", 0.4), layer("three", 0.1)]
    root = parsed(layer_figures.layer_bars(layers, Cutoffs()))
    assert len({one.get("d") for one in marked(root, "mark")}) == 3


def test_narrow_names_still_tell_layers_apart() -> None:
    names = [f"model.layers.{i}.attention.{part}_projection" for i in range(12) for part in "qkv"]
    root = parsed(layer_figures.layer_bars([layer(name, 0.1) for name in names], Cutoffs()))
    for kind in ("wide", "narrow"):
        assert len({text.text for text in marked(root, kind)}) == len(names)


def test_the_axis_ends_with_the_data_and_says_so() -> None:
    root = parsed(layer_figures.layer_bars([layer("one", 0.0075)], Cutoffs()))
    assert width(marked(root, "bar")[0]) == pytest.approx(0.0075 / 0.008)
    assert [tick.text for tick in marked(root, "tick")] == [
        fine_percent(0.004),
        fine_percent(0.008),
    ]
    assert marked(root, "bar")[0].get("class") == "bar good"
    strip = parsed(layer_figures.layer_strip([layer("one", 0.0075), layer("two", 0)], Cutoffs()))
    assert [float(bar.get("height", "")) for bar in marked(strip, "bar")] == [38, 2]


@pytest.mark.parametrize(
    ("largest", "end"), [(0, 1), (0.0075, 0.008), (0.1, 0.1), (0.101, 0.12), (0.99, 1), (3.3, 4)]
)
def test_axes_end_at_round_numbers(largest: float, end: float) -> None:
    assert layer_figures.axis_end(largest) == pytest.approx(end)


def test_kinds_are_told_apart_by_a_word() -> None:
    rows = [layer("h.0.mlp", 0.1), layer("h.0.attn", 0.1).model_copy(update={"kind": "attention"})]
    for drawing in (layer_figures.layer_bars(rows, Cutoffs()), node_map(rows)):
        told = [text.text for text in marked(parsed(drawing), "kind")]
        assert told == ["activation", "act", "attention", "attn"]
    assert not marked(parsed(layer_figures.layer_bars(rows[:1], Cutoffs())), "kind")


def test_of_very_many_layers_the_worst_get_bars_and_all_get_low_rows() -> None:
    rows = [layer(f"h.{i}.mlp", (i * 37 % 200 + 1) / 1000) for i in range(200)]
    drawn = layer_figures.drawn_bars(rows)
    assert len(drawn) == layer_figures.WORST
    assert min(a.relative for a in drawn) == pytest.approx((200 - layer_figures.WORST + 1) / 1000)
    assert [rows.index(a) for a in drawn] == sorted(rows.index(a) for a in drawn)
    assert len(layer_figures.drawn_bars(rows[:48])) == 48
    ((name, drawing),) = layer_figures.node_maps(rows)
    root = parsed(drawing)
    assert name == "" and float(root.get("height", "")) < 1500
    assert len(marked(root, "wide")) == 67


def test_of_very_many_layers_every_kind_has_a_map_and_shades_are_common() -> None:
    rows = [
        layer(f"h.{i}.{kind}", 0.5 if kind == "norm" else 0.001).model_copy(update={"kind": kind})
        for i in range(60)
        for kind in ("norm", "attention")
    ]
    maps = layer_figures.node_maps(rows)
    assert [name for name, _ in maps] == ["norm", "attention"]
    worst, least = (parsed(drawing) for _, drawing in maps)
    assert len(marked(worst, "shade-7")) == len(marked(least, "shade-1")) == 60
    ((name, _),) = layer_figures.node_maps(rows[:90])
    assert name == ""
    assert layer_figures.node_maps([]) == ()


def test_shades_have_numbers_where_they_meet() -> None:
    edges = layer_figures.shade_edges(0.001, 1.0)
    assert len(edges) == layer_figures.SHADES + 1
    assert (edges[0], edges[-1]) == (pytest.approx(0.001), pytest.approx(1.0))
    for step, edge in enumerate(edges[1:-1], start=1):
        assert layer_figures.shade(edge * 0.99, 0.001, 1.0) == step
        assert layer_figures.shade(edge * 1.01, 0.001, 1.0) == step + 1
    assert layer_figures.shade_edges(0.0, 0.0) == layer_figures.shade_edges(2.0, 2.0) == ()


def test_identical_experts_draw_empty_bars_and_the_palest_cells() -> None:
    layers = [layer("one", 0.0, 0.0, 0.0), layer("two", 0.0)]
    bars = marked(parsed(layer_figures.layer_bars(layers, Cutoffs(fair=0.0, poor=0.0))), "bar")
    assert [width(bar) for bar in bars] == [0, 0]
    assert len(marked(parsed(node_map(layers)), "shade-0")) == 3
    parsed(layer_figures.layer_strip(layers, Cutoffs(fair=0.0, poor=0.0)))


def test_node_groups_cover_every_node_once() -> None:
    groups = layer_figures.node_groups(layer("x", 1.0, 1.0, 3.0, 5.0, 7.0, 9.0), 2)
    assert groups == (
        NodeGroup(0, 1, 2.0, pytest.approx((2 / 5) ** 0.5)),
        NodeGroup(2, 4, 7.0, pytest.approx((7 / 5) ** 0.5)),
    )
    wide = layer_figures.node_groups(layer("x", 1.0, *range(1152)))
    assert len(wide) == 32
    assert [n for g in wide for n in range(g.first, g.last + 1)] == list(range(1152))
    assert len(layer_figures.node_groups(layer("x", 1.0, 1.0, 2.0))) == 2


def test_the_node_map_tells_layer_nodes_and_value() -> None:
    root = parsed(node_map([layer("conv", 0.1, *[0.5] * 64), layer("fc", 0.4, 5.0)]))
    cells = marked(root, "cell")
    assert len(cells) == 32 + 1
    assert titles(root)[1] == f"conv, nodes 2–3: M-Loss {percent(0.1, 0)}"
    assert titles(root)[-1] == f"fc, node 0: M-Loss {percent(0.4, 0)}"
    assert sum(width(cell) for cell in cells[:32]) == pytest.approx(1.0)
    assert [cells[0].get("class"), cells[-1].get("class")] == ["cell shade-1", "cell shade-7"]


def test_shades_are_logarithmic() -> None:
    assert [layer_figures.shade(x, 1e-4, 1.0) for x in (0, 1e-9, 1e-4, 1e-2, 0.5, 1.0)] == [
        0,
        1,
        1,
        4,
        7,
        7,
    ]


def test_every_cosine_stands_in_its_cell() -> None:
    cosines = ((1.0, -0.014), (-0.014, 1.0))
    root = parsed(figures.cosine_matrix(NAMES, cosines))
    assert [text.text for text in marked(root, "inside")] == [
        fixed(value) for row in cosines for value in row
    ]
    assert titles(root)[1] == "a and b: cosine −0.01"
    tones = [(cell.get("class") or "").split()[1] for cell in marked(root, "cell")]
    assert tones == ["own", "minus-0", "minus-0", "own"]


def test_an_undefined_cosine_is_said_to_be_so() -> None:
    root = parsed(figures.cosine_matrix(NAMES, ((1.0, None), (None, 1.0))))
    assert marked(root, "inside")[1].text == "undefined"


def test_the_strip_has_a_bar_a_layer_whose_height_tells_the_loss() -> None:
    root = parsed(layer_figures.layer_strip([layer("one", 0.15), layer("two", 0.3)], Cutoffs()))
    low, high = (float(bar.get("height", "")) for bar in marked(root, "bar"))
    assert high == pytest.approx(2 * low)
    assert "1 fair, 1 poor" in root.get("aria-label", "")


def test_hostile_names_stay_text(example: dict[str, Any]) -> None:
    name = "</title><script>alert(1)</script>"
    drawing = layer_figures.layer_bars([layer(name, 0.1)], Cutoffs())
    drawing += node_map([layer(name, 0.1)])
    drawing += figures.cosine_matrix((name, "b"), ((1.0, 0.0), (0.0, 1.0)))
    assert "<script" not in drawing
