import copy
import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from mergewell.errors import DataError, OutputError
from mergewell.report.compare import compare, compared, differences, square_and_add
from mergewell.report.numbers import points
from mergewell.report.results import Check, Results, validated, write_results
from mergewell.report.side import Side, flat, read_side

Data = dict[str, Any]
INTERVALS = {"a": (0.4, 0.6), "b": (0.7, 0.9), "mean": (0.6, 0.7)}


def manifest(recipe: Data) -> Data:
    return {
        "version": 1, "recipe": recipe, "inputs": [], "outputs": [], "tensors": 3,
        "tensors_changed": 2, "seed": 0, "versions": {}, "seconds": 0.5,
    }  # fmt: skip


@pytest.fixture
def demo(example: Data, tmp_path: Path) -> Path:
    """A results folder with two of its merges in it."""
    write_results(tmp_path / "demo", validated(Results, example, where="example"))
    for method, more in (("average", {}), ("ties", {"density": 0.2})):
        folder = tmp_path / "demo" / "merged" / method
        folder.mkdir(parents=True)
        recipe = {"base": "b", "experts": [{"path": "e"}], "method": {"name": method, **more}}
        (folder / "manifest.json").write_text(json.dumps(manifest(recipe)), encoding="utf-8")
    return tmp_path / "demo"


def test_intervals_of_differences_are_squared_and_added() -> None:
    # by hand: 0.8 - 0.5 = 0.3; low by hypot(0.8 - 0.74, 0.58 - 0.5), high by hypot(0.08, 0.06)
    low, high = square_and_add(0.5, 0.8, (0.44, 0.58), (0.74, 0.88))
    assert (low, high) == (pytest.approx(0.3 - 0.1), pytest.approx(0.3 + math.hypot(0.08, 0.06)))


def test_differences_are_of_the_tasks_that_both_have() -> None:
    one, other = {"a": 0.5, "b": 0.8, "c": 0.1}, {"b": 0.7, "a": 0.6}
    a, b, mean = differences(one, other, INTERVALS, INTERVALS)
    assert (a.name, b.name, mean.name) == ("a", "b", "mean")
    assert a.change == pytest.approx(0.1) and a.low is not None
    assert (mean.one, mean.other) == (pytest.approx(0.65), pytest.approx(0.65))
    assert mean.low is None, "the interval is of other tasks"
    assert differences(one, one, INTERVALS, {})[0].low is None
    assert [d.name for d in differences({"a": 0.5}, {"a": 0.6}, {}, {})] == ["a"]


def test_recipes_become_settings_by_path() -> None:
    recipe = {"experts": [{"path": "x"}, {"path": "y", "coefficient": 0.5}], "method": {"scale": 1}}
    assert flat(recipe) == {
        "experts.1.path": "x",
        "experts.2.path": "y",
        "experts.2.coefficient": 0.5,
        "method.scale": 1,
    }


def test_a_merged_folder_brings_its_accuracies_along(demo: Path, example: Data) -> None:
    side = read_side(demo / "merged" / "ties")
    assert (side.name, side.method) == ("ties", "ties")
    assert side.accuracy == example["accuracy"]["merged"]["ties"]
    assert side.agreement == example["agreement"]["ties"]
    assert side.manifest is not None and side.recipe["method.density"] == 0.2
    best = read_side(demo)
    assert (best.name, best.method) == ("demo/ties", "ties")
    assert best.recipe == {"base": "efficientnet-lite0", "method.name": "ties"}


def test_two_merges_side_by_side(demo: Path, tmp_path: Path) -> None:
    path = compare(demo / "merged" / "average", demo / "merged" / "ties", tmp_path / "out")
    assert path == tmp_path / "out" / "compare.html"
    page = unescape(path.read_text(encoding="utf-8"))
    assert "ties is better than average: mean accuracy 86.3" in page
    assert "One check stands behind both" in page and 'id="layers"' not in page
    found = compared(read_side(demo / "merged" / "average"), read_side(demo / "merged" / "ties"))
    assert [(s.name, s.one, s.other) for s in found.settings] == [
        ("method.name", "average", "ties"),
        ("method.density", None, 0.2),
    ]
    assert found.same_settings == 2
    for row in found.accuracy:
        assert points(row.change) in page
    assert "+3.5" in page and "2 of 3" in page


def test_what_cannot_be_told_apart_is_not_called_better(demo: Path) -> None:
    one, other = read_side(demo / "merged" / "average"), read_side(demo / "merged" / "ties")
    assert compared(one, other).sentence().startswith("ties is better than average")
    assert compared(other, one).sentence().startswith("ties is better than average")
    assert compared(one, one).sentence().startswith("average and average have the same")
    results = other.results
    assert results is not None
    wide = {
        m: dict.fromkeys(results.tasks, (0.0, 1.0)) | {"mean": (0.0, 1.0)}
        for m in ("average", "ties")
    }
    held = results.model_copy(
        update={"intervals": results.intervals.model_copy(update={"merged": wide})}
    )
    unsure = [Side(m, held, m) for m in ("average", "ties")]
    assert "cannot be told apart" in compared(*unsure).sentence()
    bare = results.model_copy(
        update={"intervals": results.intervals.model_copy(update={"merged": {}})}
    )
    assert (
        "no intervals say" in compared(*[Side(m, bare, m) for m in ("average", "ties")]).sentence()
    )


def two_checks(example: Data, folder: Path) -> tuple[Path, Path]:
    other = copy.deepcopy(example["check"])
    for row in other["layers"]:
        row["relative"] *= 0.5
    other["findings"][0]["value"] = 0.111
    other["layers"].pop(3)
    paths = folder / "one.json", folder / "two.json"
    for path, check in zip(paths, (example["check"], other), strict=True):
        path.write_text(json.dumps(check), encoding="utf-8")
    return paths


def test_two_checks_side_by_side(example: Data, tmp_path: Path) -> None:
    page = unescape(compare(*two_checks(example, tmp_path), tmp_path / "c.html").read_text())
    assert "two.json has more M-Loss than one.json in 0 of 33 layers." in page
    assert "36.4" in page and "11.1" in page and "weak on its own" in page
    found = compared(*(read_side(p) for p in two_checks(example, tmp_path)))
    assert len(found.layers) == 33 and len(found.findings) == 6
    assert all(pair.other == pytest.approx(pair.one / 2) for pair in found.layers)


def test_sides_of_one_name_are_told_apart(example: Data, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        check = validated(Check, example["check"], where="x").model_dump_json()
        (tmp_path / name / "check.json").write_text(check, encoding="utf-8")
    page = compare(tmp_path / "x/check.json", tmp_path / "y/check.json", tmp_path / "c.html")
    assert "x/check.json" in page.read_text() and "y/check.json" in page.read_text()


def test_a_folder_that_mergewell_did_not_write_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither results\.json nor manifest\.json"):
        compare(tmp_path, tmp_path, tmp_path / "out")


def test_hostile_settings_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    for name, value in (("one", evil), ("two", "x")):
        (tmp_path / name).mkdir()
        recipe = {evil: value, "list": [evil]}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest(recipe)))
    page = compare(tmp_path / "one", tmp_path / "two", tmp_path).read_text()
    assert page.count("<script>") == 1 and "alert(1)" in page
    assert "differ in 1 setting" in unescape(page)


@pytest.mark.parametrize("width", [1280, 400])
def test_the_comparison_fits(
    demo: Path, example: Data, tmp_path: Path, browser: Any, width: int
) -> None:
    pages = [compare(demo / "merged" / "average", demo / "merged" / "ties", tmp_path / "m.html")]
    pages.append(compare(*two_checks(example, tmp_path), tmp_path / "c.html"))
    for page in pages:
        browser.open(page, width=width)
        assert browser.ask("document.documentElement.scrollWidth") == width
        assert (
            browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 251)"
        )
        assert [url for url in browser.asked_for if not url.startswith("file:")] == []
        found = re.findall(r"<table.*?</table>", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert found and all("<caption>" in table for table in found)


def test_a_page_replaces_pages_of_mergewell_only(demo: Path, tmp_path: Path) -> None:
    sides, out = (demo / "merged" / "average", demo / "merged" / "ties"), tmp_path / "mine.html"
    for _ in range(2):
        compare(*sides, out)
    out.write_text("<html>mine</html>")
    with pytest.raises(OutputError, match=r"mine\.html exists already and is no page of mergewell"):
        compare(*sides, out)
    assert out.read_text() == "<html>mine</html>"
