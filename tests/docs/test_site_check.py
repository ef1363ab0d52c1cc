"""The check of the built site finds each kind of fault, and nothing in a sound site."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
spec = importlib.util.spec_from_file_location("site_check", DOCS / "site_check.py")
assert spec is not None and spec.loader is not None
site_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_check)


def site(folder: Path, body: str) -> Path:
    (folder / "a").mkdir()
    (folder / "a/x.html").write_text('<h1 id="here">x</h1><a href="../index.html#top">up</a>')
    (folder / "style.css").write_text("body { background: url(own.png) }")
    (folder / "index.html").write_text(
        f'<h1 id="top">t</h1><link rel="stylesheet" href="style.css"><a href="a/x.html#here">x</a>'
        f'<a href="https://example.org/p">out</a>{body}'
    )
    return folder


def test_a_sound_site_has_no_fault(tmp_path: Path) -> None:
    assert list(site_check.faults(site(tmp_path, '<img src="data:,">'))) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('<a href="gone.html">', "which is not there"),
        ('<a href="a/x.html#there">', "an anchor that the page lacks"),
        ('<a href="#there">', "an anchor that the page lacks"),
        ('<a href="https://nowhere">', "no address"),
        ('<a href="javascript:x()">', "a scheme"),
        ('<script src="https://cdn.example.org/m.js"></script>', "from the network"),
        ('<link rel="stylesheet" href="//fonts.example.org/f.css">', "from the network"),
        ('<img src="gone.png">', "which is not there"),
        ('<p style="background: url(https://example.org/b.png)">', "from the network"),
        ('<img src="data:," srcset="https://example.org/b.png 2x">', "from the network"),
    ],
)
def test_each_kind_of_fault_is_named(tmp_path: Path, body: str, words: str) -> None:
    found = list(site_check.faults(site(tmp_path, body)))
    assert len(found) == 1
    assert words in found[0] and found[0].startswith("index.html")


def test_a_style_sheet_that_asks_the_network_is_a_fault(tmp_path: Path) -> None:
    site(tmp_path, "")
    (tmp_path / "style.css").write_text('@import "https://example.org/f.css";')
    assert list(site_check.faults(tmp_path)) == [
        "style.css loads https://example.org/f.css from the network."
    ]


def test_an_empty_folder_is_no_site(tmp_path: Path) -> None:
    assert "build it first" in next(site_check.faults(tmp_path))
