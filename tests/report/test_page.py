import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergewell.errors import DataError
from mergewell.report import figures, layer_figures
from mergewell.report.findings import shown as shown_value
from mergewell.report.numbers import fine_percent, fixed, number, percent
from mergewell.report.page import render_page, write_check_page, write_page
from mergewell.report.results import Check, Results, validated, write_results

Data = dict[str, Any]

SECTIONS = ("verdict", "reasons", "next", "choice", "accuracy", "ensemble", "layers", "heads")
SECTIONS += ("blocks", "nodes", "vectors", "theory", "compared", "places", "predictors")
SECTIONS += ("uncovered", "making", "words")

MERGED = ("choice", "accuracy", "ensemble")


@pytest.fixture
def results(example: Data) -> Results:
    return validated(Results, example, where="example")


def tables(page: str) -> str:
    return html.unescape(" ".join(re.findall(r"<table.*?</table>", page, flags=re.DOTALL)))


def sections(page: str) -> tuple[str, ...]:
    return tuple(re.findall(r'<(?:section|header) id="(\w+)"', page))


def test_the_page_tells_everything_verdict_first(results: Results) -> None:
    assert sections(render_page(results)) == SECTIONS


def test_a_page_from_a_check_leaves_out_what_it_does_not_have(results: Results) -> None:
    assert results.check is not None
    page = render_page(Results.of_check(results.check))
    assert sections(page) == tuple(s for s in SECTIONS if s not in MERGED)
    assert results.check.verdict in html.unescape(page)
    anchors = re.findall(r'href="#(\w+)"', page)
    assert set(anchors) <= set(sections(page))


def test_empty_results_still_make_a_page() -> None:
    assert sections(render_page(Results())) == ("verdict", "making", "words")


def test_weights_only_checks_have_no_layer_sections(example: Data) -> None:
    data = example["check"] | {"layers": [], "samples": None, "mode": None, "uncovered": []}
    page = render_page(Results.of_check(validated(Results, {"check": data}, where="x").check))  # type: ignore[arg-type]
    assert sections(page) == tuple(
        s
        for s in SECTIONS
        if s not in (*MERGED, "layers", "heads", "blocks", "nodes", "theory", "uncovered")
    )


def test_every_number_of_every_figure_stands_in_a_table(results: Results) -> None:
    told = tables(render_page(results))
    shown = [percent(x.relative, 2) for x in results.layers]
    shown += [number(x.absolute) for x in results.layers]
    shown += [fine_percent(g.relative) for x in results.units for g in layer_figures.node_groups(x)]
    for one in figures.accuracy_series(results, "ties"):
        shown += [percent(value) for value in one.values.values()]
        shown += [percent(high) for _, high in one.intervals.values()]
    shown += [fixed(x, 3) for row in results.cosines for x in row if x is not None]
    theory = [x for x in results.layers if x.ratio is not None]
    shown += [number(x) for a in theory for x in (a.mean_gap, a.expected_gap, a.bound) if x]
    shown += [fine_percent(x) for a in results.layers for x in a.heads]
    assert results.check is not None
    for one in results.check.findings:
        shown += [shown_value(x, one.unit) for x in one.by_place.values()]
    missing = [value for value in shown if value not in told]
    assert len(shown) > 1100
    assert missing == []


def test_tables_have_captions_and_scopes(results: Results) -> None:
    page = render_page(results)
    found = re.findall(r"<table.*?</table>", page, flags=re.DOTALL)
    assert len(found) >= 7
    for table in found:
        assert "<caption>" in table
        heads = re.findall(r"<th\b[^>]*>", table)
        assert heads and all('scope="' in head for head in heads)


def test_nothing_is_asked_from_the_network(results: Results) -> None:
    page = render_page(results)
    assert not re.search(r"""(src|href|action|data)\s*=\s*["']?\s*(https?:)?//""", page)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page)
    assert re.findall(r"https?://", page) == []
    assert "default-src 'none'" in html.unescape(page)


def test_hostile_names_stay_text(example: Data) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    example["tasks"][0] = evil
    accuracy, intervals = example["accuracy"], example["intervals"]
    by_task = [accuracy[kind] for kind in ("base", "expert", "ensemble")]
    by_task += [intervals[kind] for kind in ("base", "expert", "ensemble")]
    by_task += [*accuracy["merged"].values(), *intervals["merged"].values()]
    by_task += [*example["agreement"].values(), *example["kl"].values()]
    for table in by_task:
        if "mnist" in table:
            table[evil] = table.pop("mnist")
    example["models"]["experts"] = [evil, *example["tasks"][1:]]
    example["norms"] = {evil: 0.1}
    example["title"] = example["check"]["verdict"] = evil
    example["check"]["uncovered"] = [evil]
    example["check"]["uncovered_reasons"] = {evil: evil}
    example["check"]["findings"][0] |= {"where": evil, "unit": evil, "advice": evil}
    example["m_loss"][0]["layer"] = example["m_loss"][0]["activation"] = evil
    example["seconds"] = {evil: 1.0}
    example["versions"] = {evil: evil}
    example["merges"][0] |= {"recipe": evil, "command": evil, "path": evil}
    page = render_page(validated(Results, example, where="example"))
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert page.count("alert(1)") > 20


def test_the_time_of_all_steps_is_not_counted_twice(example: Data) -> None:
    for seconds in ({"check": 14.2, "merge": 1.1}, {"check": 14.2, "merge": 1.1, "all": 15.3}):
        example["seconds"] = seconds
        page = render_page(validated(Results, example, where="example"))
        assert "15.3 s in all: check 14.2 s, merge 1.1 s</dd>" in page


def test_a_command_of_several_lines_keeps_them(example: Data) -> None:
    example["merges"] = [{"method": "ties", "command": "mergewell merge \\\n  --out DIR"}]
    page = render_page(validated(Results, example, where="example"))
    told = re.findall(r"<pre><code>(.*?)</code></pre>", page, flags=re.DOTALL)
    assert re.sub(r"<.*?>", "", told[0]) == "mergewell merge \\\n  --out DIR"


def test_the_page_is_written_beside_its_results(example: Data, tmp_path: Path) -> None:
    example["report"] = "page.html"
    write_results(tmp_path, validated(Results, example, where="example"))
    path = write_page(tmp_path)
    assert path == tmp_path / "page.html"
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.html", "results.json"]


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results\.json cannot be read"):
        write_page(tmp_path)


def test_the_same_results_make_the_same_page(results: Results) -> None:
    assert render_page(results) == render_page(results)


def test_torch_is_not_needed() -> None:
    code = "import sys, mergewell.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def crowd(example: Data) -> Data:
    """Nine experts of an LLM, with long names and many merges."""
    tasks = [f"a_rather_long_task_name_{index}" for index in range(9)]
    methods = [f"task_arithmetic with coefficient {index / 10}" for index in range(8)]
    by_task = {task: index / 9 for index, task in enumerate(tasks, start=1)}
    layers = [
        row | {"layer": f"vision_model.encoder.layers.{index}.self_attention.key_value_projection"}
        for index, row in enumerate(example["m_loss"])
    ]
    return {
        "tasks": tasks,
        "models": {"base": "some-organisation/" + "long" * 30, "experts": tasks},
        "accuracy": {"expert": by_task, "merged": dict.fromkeys(methods, by_task)},
        "intervals": {"merged": {method: {tasks[0]: [0.0, 1.0]} for method in methods}},
        "cosines": [[-0.25] * 9] * 9,
        "norms": by_task,
        "m_loss": layers,
        "merges": [{"method": methods[0], "command": "mergewell merge " + "/x" * 200}],
    }


def deep() -> Data:
    """The check of an LLM of 30 blocks: units of every kind, heads and theory."""
    layers: list[Data] = []
    for block in range(30):
        size = 0.002 * 1.15**block
        for part, kind in (("input_layernorm", "norm"), ("self_attn", "attention"),
                           ("mlp.gate_proj", "gated"), ("mlp.down_proj", "activation"),
                           ("", "block")):  # fmt: skip
            name = f"model.layers.{block}.{part}".rstrip(".")
            layers.append(
                {"layer": name, "kind": kind, "activation": kind, "nodes": 40, "absolute": size}
                | {"relative": size, "node": [size * (i % 7 + 1) for i in range(40)]}
                | ({"heads": [size] * 8} if kind == "attention" else {})
                | ({"ratio": 0.5 + size, "expected_gap": size} if kind == "gated" else {})
            )
    return {"base": "b", "experts": ["x", "y"], "samples": 8, "mode": "own", "layers": layers} | {
        "verdict": "They merge.",
        "findings": [{"question": "?", "verdict": "Yes.", "level": "good"}],
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, unchanged_example: Data) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    results = validated(Results, unchanged_example, where="example")
    write_results(folder, results)
    write_page(folder)
    assert results.check is not None
    write_check_page(results.check, folder / "check.html")
    crowded = validated(Results, crowd(unchanged_example), where="crowded")
    (folder / "crowded.html").write_text(render_page(crowded), encoding="utf-8")
    write_check_page(validated(Check, deep(), where="deep"), folder / "deep.html")
    return folder


VISIBLE = """(() => {
  const box = document.querySelector("h1").getBoundingClientRect();
  const style = getComputedStyle(document.body);
  return { text: document.querySelector("h1").textContent, top: box.top, width: box.width,
           height: box.height, paper: style.backgroundColor, ink: style.color };
})()"""

# What sticks out of the page: anything wider, unless it lies in a box that scrolls by itself.
STICKS_OUT = """[...document.querySelectorAll("body *")].filter((one) => {
  const box = one.getBoundingClientRect();
  const seen = box.width > 0 && !one.closest(".scroll") && !one.closest("details:not([open])");
  return seen && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map((one) => one.outerHTML.slice(0, 120))"""

# Texts and marks of one figure that lie on each other.
OVERLAPS = """[...document.querySelectorAll("svg.figure")].flatMap((figure) => {
  const held = [...figure.querySelectorAll("text, .mark")].map((text) => [text.textContent,
    text.getBoundingClientRect()]).filter(([, box]) => box.width > 0);
  return held.flatMap(([a, one], i) => held.slice(i + 1).filter(([, two]) =>
    one.left < two.right - 1 && two.left < one.right - 1 &&
    one.top < two.bottom - 4 && two.top < one.bottom - 4).map(([b]) => a + " / " + b));
})"""


# Names that run into what is drawn beside them.
RUNS_INTO = """[...document.querySelectorAll("svg.figure")].flatMap((figure) => {
  const left = Math.min(...[...figure.querySelectorAll(".reach, .cell")].map((one) =>
    one.getBoundingClientRect().left));
  return [...figure.querySelectorAll(".name")].filter((name) =>
    name.getBoundingClientRect().right > left - 1).map((name) => name.textContent);
})"""


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("name", ["index.html", "check.html", "crowded.html"])
def test_the_page_fits_and_shows_its_verdict(
    pages: Path, browser: Any, *, name: str, scripts: bool, scheme: str, width: int
) -> None:
    browser.open(pages / name, width=width, scheme=scheme, scripts=scripts)
    seen = browser.ask(VISIBLE)
    assert "erge" in seen["text"]
    assert 0 < seen["top"] < 500 and seen["height"] > 20 and seen["width"] > 200
    light = "rgb(253, 253, 251)"
    assert (seen["paper"] == light) == (scheme == "light")
    assert seen["paper"] != seen["ink"]
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert browser.ask(STICKS_OUT) == []
    assert browser.ask(OVERLAPS) == []
    assert browser.ask(RUNS_INTO) == []
    assert [url for url in browser.asked_for if not url.startswith("file:")] == []


@pytest.mark.parametrize("width", [360, 720, 961, 1600])
@pytest.mark.parametrize("name", ["index.html", "crowded.html", "deep.html"])
def test_widths_between_fit_too(pages: Path, browser: Any, *, name: str, width: int) -> None:
    browser.open(pages / name, width=width)
    for sought in (STICKS_OUT, OVERLAPS, RUNS_INTO):
        assert browser.ask(sought) == []


@pytest.mark.parametrize("width", [1280, 400])
def test_a_deep_network_stays_readable(pages: Path, browser: Any, width: int) -> None:
    browser.open(pages / "deep.html", width=width)
    assert browser.ask("document.querySelectorAll('#layers .layers .bar').length") == 24
    assert browser.ask("document.querySelectorAll('#nodes svg.figure').length") == 4
    assert browser.ask("document.documentElement.scrollHeight") < 16000
    for sought in (STICKS_OUT, OVERLAPS, RUNS_INTO):
        assert browser.ask(sought) == []


def test_opened_tables_scroll_in_their_own_box(pages: Path, browser: Any) -> None:
    browser.open(pages / "index.html", width=400)
    browser.ask("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.ask("document.documentElement.scrollWidth") == 400
    assert browser.ask(STICKS_OUT) == []


def test_values_open_by_touch_and_the_theme_turns(pages: Path, browser: Any) -> None:
    browser.open(pages / "index.html", width=400)
    point = browser.ask(
        """(() => { const cell = document.querySelector(".nodes .cell"); cell.scrollIntoView();
        const box = cell.getBoundingClientRect();
        return { x: box.x + box.width / 2, y: box.y + box.height / 2 }; })()"""
    )
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    tip = "document.querySelector('.tip:not([hidden])')?.textContent"
    assert str(browser.ask(tip)).startswith("_conv_stem, node 0: M-Loss ")
    browser.ask("document.getElementById('theme').click()")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 24)"
    assert browser.ask("document.getElementById('theme').textContent") == "Light"


def test_without_scripts_values_are_native_titles(pages: Path, browser: Any) -> None:
    browser.open(pages / "index.html", width=1280, scripts=False)
    assert browser.ask("document.querySelectorAll('svg title').length") > 1000
    assert browser.ask("document.getElementById('theme').offsetWidth") == 0


def test_paper_is_white_even_when_the_screen_is_dark(pages: Path, browser: Any) -> None:
    browser.open(pages / "index.html", width=720, scheme="dark")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", media="print", features=features)
    assert browser.ask("getComputedStyle(document.body).color") == "rgb(25, 28, 32)"
    assert browser.ask("document.getElementById('theme').offsetWidth") == 0
    assert browser.ask("document.documentElement.scrollWidth") == 720


@pytest.mark.parametrize("media", ["light", "dark"])
def test_text_can_be_read_on_its_ground(pages: Path, browser: Any, media: str) -> None:
    browser.open(pages / "index.html", width=1280, scheme=media)
    paper = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(253, 253, 251)", "dark": "rgb(18, 21, 24)"}[media]
    contrast = """(() => {
      const light = (colour) => { const [r, g, b] = colour.match(/\\d+/g).map((c) => c / 255)
        .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const paper = light(getComputedStyle(document.body).backgroundColor);
      const ink = (name) => light(getComputedStyle(document.querySelector(name)).color);
      return [".soft", "summary", ".level.good", ".level.fair", ".level.poor", "td"].map(
        (name) => [name, ratio(paper, ink(name))]);
    })()"""
    faint = [(name, ratio) for name, ratio in browser.ask(contrast) if ratio < 4.5]
    assert faint == []


def test_a_picture_can_be_taken(pages: Path, browser: Any, tmp_path: Path) -> None:
    browser.open(pages / "index.html", width=1280)
    assert browser.picture(tmp_path / "page.png").stat().st_size > 50_000
