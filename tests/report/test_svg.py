from xml.etree import ElementTree

from mergewell.report import svg


def test_a_long_name_keeps_its_block_number() -> None:
    assert svg.short("_blocks.15._depthwise_conv", 40) == "_blocks.15._depthwise_conv"
    assert svg.short("_blocks.15._depthwise_conv", 19) == "b.15.depthwise_conv"
    assert svg.short("model.layers.12.mlp.gate_proj", 20) == "m.l.12.mlp.gate_proj"
    assert svg.short("a" * 30, 10) == "…" + "a" * 9


def test_text_is_escaped_and_control_characters_are_replaced() -> None:
    root = svg.figure("x", "<b>\x00", 10)
    svg.add(root, "text", {"x": "1%"}, "</svg><script>\x07")
    parsed = ElementTree.fromstring(svg.written(root))
    assert parsed.get("aria-label") == "<b>\N{REPLACEMENT CHARACTER}"
    assert parsed[0].text == "</svg><script>\N{REPLACEMENT CHARACTER}"


def test_no_break_spaces_survive() -> None:
    assert svg.clean("5\N{NO-BREAK SPACE}%") == "5\N{NO-BREAK SPACE}%"


def test_shares_are_percentages_of_the_width() -> None:
    assert [svg.share(x) for x in (0, 0.25, 1 / 3)] == ["0%", "25%", "33.3333%"]
