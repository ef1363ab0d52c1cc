from xml.etree import ElementTree

from mergewell.report import svg


def test_a_long_name_keeps_its_block_number() -> None:
    assert svg.short("_blocks.15._depthwise_conv", 40) == "_blocks.15._depthwise_conv"
    assert svg.short("_blocks.15._depthwise_conv", 19) == "b.15.depthwise_conv"
    assert svg.short("model.layers.12.mlp.gate_proj", 20) == "m.l.12.mlp.gate_proj"
    long = "encoder.layers.31.self_attention.key_value_projection"
    assert svg.short(long, 19) == "31.…alue_projection"
    assert svg.short(long, 30) == "e.l.31.s.key_value_projection"


def test_names_that_are_no_paths_keep_their_end() -> None:
    assert svg.short("a" * 30, 10) == "…" + "a" * 9
    assert svg.short("task_arithmetic, coefficient 0.35", 12) == "…icient 0.35"
    assert svg.short("ties_density_0.2", 10) == "…nsity_0.2"


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
