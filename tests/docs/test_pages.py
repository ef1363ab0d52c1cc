"""Pages are made of what they show: kinds of blocks, formulas, results, commands, studies."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```([^\s`]+)[^\n]*\n.*?^```$", re.MULTILINE | re.DOTALL)
RUN, NOT_RUN = {"console", "python", "yaml"}, {"text", "{toctree}", "{eval-rst}"}
PAGES = [*DOCS.glob("guides/*.md"), *DOCS.glob("concepts/*.md"), DOCS / "reference/python.md"]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("generate")


@pytest.fixture
def typeset(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("typeset")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_run_or_are_plain_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    kinds = FENCE.findall(text)
    assert set(kinds) <= RUN | NOT_RUN
    assert text.count("\n```") == 2 * len(kinds), "a block without a kind would not be run"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("theta_0 - M_k'", "<var>θ</var><sub>0</sub> − <var>M</var><sub>k</sub><sup>⊤</sup>"),
        ("sum_k ||a_j||^2", "∑<sub>k</sub> ‖<var>a</var><sub>j</sub>‖<sup>2</sup>"),
        ("(C + mu)^-1", "(<var>C</var> + <var>μ</var>)<sup>−1</sup>"),
        ("expert k's own a c", "expert <var>k</var>'s own <var>a</var> <var>c</var>"),
        ("a layer of `scale`", "a layer of <code>scale</code>"),
        ("x < y", "<var>x</var> &lt; <var>y</var>"),
    ],
)
def test_formulas_are_set_letter_by_letter(typeset: ModuleType, text: str, shown: str) -> None:
    assert typeset.typeset(text) == shown


def test_a_method_says_what_was_measured_and_what_was_not(generate: ModuleType) -> None:
    row = {
        "name": "ties", "mean": 70.26, "low": 69.0, "high": 71.5, "worst": 39.1, "worst_task": "g",
        "seeds": 1, "over": {"task_arithmetic": [-0.5, -1.0, 0.04]},
    }  # fmt: skip
    ends = {"base": 60.0, "ensemble": 75.0, "experts": 91.0}
    some = [{"title": "One", "methods": [row], **ends}, {"title": "Two", "methods": [], **ends}]
    page = generate.method_page("ties", generate.Measured(some)).replace("\N{NO-BREAK SPACE}", " ")
    assert "| One | 70.3 [69.0, 71.5] | −0.5 [−1.0, +0.0] | 39.1 (g) | 1 |" in page
    assert "| Two | not measured |" in page
    assert "Streams in blocks of any size." in page and "`trim_scope`" in page
    other = generate.method_page("karcher", generate.Measured(some))
    assert "Not measured on real experts" in other
    index = generate.method_index(generate.Measured(some)).replace("\N{NO-BREAK SPACE}", " ")
    assert "## The 1 measured so far" in index
    assert (
        "| [karcher](methods/karcher.md) | entries | none | not measured | not measured |" in index
    )
    assert "| [regmean](methods/regmean.md) | inputs | inputs |" in index


def test_every_command_is_listed(generate: ModuleType) -> None:
    index = generate.command_index()
    for name in ("demo", "check", "merge", "doctor", "schema"):
        assert f"[{name}](commands/{name}.md)" in index
    assert "--strict" in generate.command_page("doctor", generate.commands()["doctor"])


def test_the_fine_tuning_page_is_that_of_its_figures() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks/atlas/fine_tuning_page.py"))
    told = json.loads((DOCS / "studies/fine_tuning.json").read_text())
    assert (DOCS / "studies/fine_tuning.md").read_text() == made["page"](told)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    names: dict[str, object] = {}
    book = nbformat.read(DOCS / "notebooks/first_merge.ipynb", as_version=4)
    cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
    assert len(cells) > 5
    for cell in cells:
        first, _, rest = cell.partition("\n")
        if first.startswith("%%writefile "):
            Path(first.split()[1]).write_text(rest)
        elif first.startswith("%%bash"):
            subprocess.run(["bash", "-ec", rest], check=True, timeout=300)
        elif not first.startswith("%pip"):
            exec(cell, names)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-d"]
    folders = [str(tmp_path / "trees"), str(DOCS), str(tmp_path / "html")]
    done = subprocess.run([*build, *folders], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(runpy.run_path(str(DOCS / "site_check.py"))["faults"](tmp_path / "html")) == []
    page = (tmp_path / "html/concepts/m_loss.html").read_text()
    assert "<math" in page and "MathJax" not in page
