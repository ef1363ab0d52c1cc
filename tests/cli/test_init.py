"""`init` and `schema`: a recipe from four answers, and what editors check recipes by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from toys import family

from mergewell.cli.main import main
from mergewell.cli.schema import recipe_schema
from mergewell.methods.base import METHODS
from mergewell.recipe import read_recipe


def answering(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """Answer questions in order; return those that were asked."""
    asked: list[str] = []
    left = iter(answers)

    def answer(question: str) -> str:
        asked.append(question)
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    return asked


def test_four_answers_make_a_recipe_that_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, experts = family(tmp_path, experts=2)
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    two = f"{experts[0].name}:0.5 {experts[1].name}"
    asked = answering(monkeypatch, "bse", "base", two, "tis", "ties", "recipes/mine.yaml")
    assert main(["init"]) == 0
    assert [question[0] for question in asked] == ["1", "1", "2", "3", "3", "4"]
    said = capsys.readouterr().out
    assert "bse does not exist" in said and "did you mean 'ties'?" in said
    text = (tmp_path / "recipes" / "mine.yaml").read_text()
    assert "# ties: " in text and "#   density: " in text
    recipe = read_recipe(Path("recipes/mine.yaml"))
    assert recipe.method.name == "ties"
    assert [e.coefficient for e in recipe.experts] == [0.5, 1.0]
    assert main(["plan", "recipes/mine.yaml"]) == 0


def test_flags_ask_nothing_and_nobody_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = family(tmp_path, experts=2)
    asked = answering(monkeypatch)
    out = tmp_path / "recipe.yaml"
    flags = [part for each in experts for part in ("--expert", str(each))]
    assert main(["init", "--base", str(base), *flags, "--out", str(out)]) == 0
    assert asked == [] and read_recipe(out).method.name == "average"
    assert main(["init", "--base", str(base), *flags, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["init", "--out", str(tmp_path / "other.yaml")]) == 2
    assert "Nobody answers" in capsys.readouterr().err
    assert main(["init", *flags, "--method", "ties", "--out", str(tmp_path / "other.yaml")]) == 2
    assert "ties needs the base" in capsys.readouterr().err
    assert not (tmp_path / "other.yaml").exists()


BASE: dict[str, Any] = {"base": "b", "experts": [{"path": "e"}]}
GOOD: list[dict[str, Any]] = [
    {"experts": [{"path": "e", "coefficient": 0.5}]},
    {**BASE, "method": {"name": "ties", "density": 0.3}},
    {**BASE, "rules": [{"match": "*.bias", "method": {"name": "keep", "model": 0}}]},
    {**BASE, "dtype": "bfloat16", "repair": {"batch_norm": "data.npz"}},
    {"experts": [{"path": "s"}], "stages": {"s": {**BASE, "method": {"name": "average"}}}},
]
BAD: list[dict[str, Any]] = [
    {"base": "b"},
    {**BASE, "method": {"name": "tis"}},
    {**BASE, "method": {"name": "ties", "densty": 0.3}},
    {**BASE, "method": {"name": "ties", "density": 2.0}},
    {**BASE, "dtype": "int8"},
    {**BASE, "expert": []},
    {"experts": [{"path": "s"}], "stages": {"s": {**BASE, "method": {"name": "tis"}}}},
]


def test_the_schema_takes_what_recipes_take() -> None:
    schema = recipe_schema()
    checker = jsonschema.Draft202012Validator(schema)
    checker.check_schema(schema)
    assert [list(checker.iter_errors(one)) for one in GOOD] == [[]] * len(GOOD)
    assert all(list(checker.iter_errors(one)) for one in BAD)
    choices = schema["$defs"]["MethodChoice"]["oneOf"]
    assert [one["title"] for one in choices] == list(METHODS.names())
    assert all(checker.is_valid({**BASE, "method": {"name": n}}) for n in ("slerp", "dare", "tsv"))


def test_the_schema_is_printed_or_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    out = tmp_path / "recipe.schema.json"
    assert main(["schema", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == printed
    assert main(["schema", "--out", str(tmp_path / "no" / "x.json")]) == 2


def test_shells_complete_commands() -> None:
    code = "from mergewell.cli.main import run; run()"
    environment = {
        "_MERGEWELL_COMPLETE": "complete_bash", "COMP_WORDS": "mergewell doc", "COMP_CWORD": "1",
        "PATH": "/usr/bin",
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.stdout.split() == ["doctor"]
