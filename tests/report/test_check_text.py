import io
import re
from typing import Any

import pytest
from rich.console import Console

from mergewell.report.check_text import show_check
from mergewell.report.findings import left_open
from mergewell.report.results import Check, validated


def printed(
    check: Check, *, width: int = 80, encoding: str = "utf-8", colour: bool = False, **more: Any
) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="")
    show_check(check, Console(file=file, width=width, force_terminal=colour, **more))
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.fixture
def check(example: dict[str, Any]) -> Check:
    return validated(Check, example["check"], where="example")


def test_the_verdict_comes_first_then_reasons_then_what_to_do(check: Check) -> None:
    text = printed(check)
    assert text.startswith("▲ fair  These experts will merge with care")
    heads = re.findall(r"^\S.*$", text, flags=re.MULTILINE)
    named = "Why|What to do|by layer|whole blocks|Theory|Other|Through|Not covered"
    assert [found[0] for head in heads if (found := re.search(named, head))] == named.split("|")
    why = text[text.index("Why") : text.index("What to do next")]
    assert "36.4 %" in why and "33.4 %" in why and "see the inputs alike" not in why
    assert "weak on its own" in text
    assert "1.  Elect signs before averaging" in text
    assert text.count("Elect signs before averaging") == 1


@pytest.mark.parametrize("width", [32, 40, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_lines_fit_and_characters_can_be_encoded(check: Check, width: int, encoding: str) -> None:
    text = printed(check, width=width, encoding=encoding)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "36.4 %" in text


def test_ascii_has_bars_and_marks_of_its_own(check: Check) -> None:
    text = printed(check, encoding="ascii")
    assert "! poor ###" in text and "+ good" in text and "~ fair" in text
    assert "█" in printed(check) and "■ poor ███" in printed(check)


@pytest.mark.parametrize("width", [1, 5, 20])
def test_very_narrow_terminals_get_no_traceback(check: Check, width: int) -> None:
    told = "".join(printed(check, width=width).split())
    assert "Whattodonext" in told
    assert max(len(line) for line in printed(check, width=width).splitlines()) <= width


def test_colour_only_where_it_is_wanted(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[32m" in printed(check, colour=True)
    assert "\x1b" not in printed(check)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", printed(check, colour=True))


def test_a_layer_cannot_give_orders_to_the_terminal(example: dict[str, Any]) -> None:
    example["check"]["layers"][0]["layer"] = "\x1b[2J[red]x"
    example["check"]["verdict"] = "[bold]Well[/bold]\x07."
    example["check"]["findings"][0]["verdict"] = "\x1b]0;title"
    text = printed(validated(Check, example["check"], where="example"))
    assert "\x1b" not in text and "\x07" not in text
    assert "[bold]Well[/bold]" in text and "[red]x" in text


def test_of_very_many_layers_the_worst_are_printed(example: dict[str, Any]) -> None:
    row = example["check"]["layers"][0] | {"node": []}
    example["check"]["layers"] = [
        row | {"layer": f"h.{i}.mlp", "relative": (i + 1) / 1000} for i in range(200)
    ]
    text = printed(validated(Check, example["check"], where="example"))
    assert len(re.findall(r"^  h\.\d+\.mlp", text, flags=re.MULTILINE)) == 24
    assert "176 layers with less M-Loss left out" in " ".join(text.split())


def test_a_check_of_weights_alone_is_printed(example: dict[str, Any]) -> None:
    bare = {"base": "b", "experts": ["e"], "verdict": "Yes."}
    assert printed(validated(Check, bare, where="x")) == "● good  Yes.\n"
    example["check"] |= {"layers": [], "samples": None, "mode": None, "uncovered": []}
    text = printed(validated(Check, example["check"], where="x"))
    assert "--data" in text and "M-Loss by layer" not in text


def test_what_was_not_answered_is_told_with_what_it_asks_for() -> None:
    check = Check(
        base="b", experts=("x",), verdict="v",
        unanswered={"barrier": "Asks for logits.", "cka": "Asks for data.", "b": "Asks for data."},
    )  # fmt: skip
    assert left_open(check) == [("barrier", "Asks for logits."), ("cka, b", "Asks for data.")]
    text = printed(check)
    assert "Not answered" in text and "cka, b" in text and "Asks for logits." in text
