"""Model cards: the recipe, licences, citations and hashes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML
from toys import family, recipe_of

from mergewell.card import Licence, licence_of, write_card
from mergewell.errors import CheckpointError, OutputError
from mergewell.plan import make_plan
from mergewell.recipe import make_recipe
from mergewell.run import run
from mergewell.storage.manifest import read_manifest, verify_files


def front(text: str) -> dict[str, object]:
    return YAML(typ="safe").load(text.split("---")[1])


def test_a_card_says_what_was_merged(tmp_path: Path) -> None:
    base, experts = family(tmp_path, experts=2)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (experts[0] / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own-1\nlicense_link: https://x.y/z\n---\n"
    )
    rules = [{"match": "*.bias", "method": {"name": "average"}}]
    run(make_plan(recipe_of(base, experts, {"name": "ties"}, rules=rules)), tmp_path / "out")
    text = write_card(tmp_path / "out").read_text()
    assert front(text) == {
        "license": "other",
        "base_model": ["base", "expert0", "expert1"],
        "tags": ["merge", "mergewell"],
    }
    assert "| base | apache-2.0 |" in text
    assert "| expert0 | [own-1](https://x.y/z) |" in text
    assert "Nothing is said of the licence of expert1" in text
    assert "Several licences hold together: apache-2.0, own-1." in text
    assert "**ties**" in text
    assert "https://arxiv.org/abs/2306.01708" in text
    assert "https://arxiv.org/abs/2203.05482" in text
    assert "fine-tuned from base" in text
    manifest = read_manifest(tmp_path / "out")
    assert all(file.hash in text for file in manifest.inputs)
    recipe = make_recipe(YAML(typ="safe").load(text.split("```yaml\n")[1].split("```")[0]))
    assert recipe == make_recipe(manifest.recipe)
    assert verify_files(tmp_path / "out") == []
    with pytest.raises(OutputError, match="exists already"):
        write_card(tmp_path / "out")


def test_one_licence_is_the_results(tmp_path: Path) -> None:
    _, experts = family(tmp_path, experts=2)
    for expert in experts:
        (expert / "README.md").write_text("---\nlicense: mit\n---\n")
    stages = {"first": {"experts": [{"path": str(e)} for e in experts]}}
    data = {"experts": [{"path": "first"}, {"path": str(experts[0])}], "stages": stages}
    run(make_plan(make_recipe(data)), tmp_path / "out")
    found = front(write_card(tmp_path / "out").read_text())
    assert found["license"] == "mit"
    assert found["base_model"] == ["expert0", "expert1"]


def test_licences_are_read_where_they_stand(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == Licence("")
    (tmp_path / "LICENSE.txt").write_text("\n  Some Licence 2\nmore")
    assert licence_of(tmp_path) == Licence("Some Licence 2")
    (tmp_path / "README.md").write_text("---\nlicense: [mit]\n---\n")
    assert licence_of(tmp_path) == Licence("mit")
    (tmp_path / "README.md").write_text("---\n{broken\n---\n")
    assert licence_of(tmp_path) == Licence("Some Licence 2")
    with pytest.raises(CheckpointError, match="has no manifest"):
        write_card(tmp_path)
