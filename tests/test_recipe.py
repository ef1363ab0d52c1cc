"""One recipe from YAML, flags and Python, and sentences for what cannot be one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from safetensors.torch import load_file
from toys import family

from mergewell.errors import CheckpointError, MergewellError, RecipeError
from mergewell.flags import recipe_from_flags
from mergewell.plan import make_plan
from mergewell.recipe import Expert, MethodChoice, Recipe, make_recipe, read_recipe
from mergewell.run import merge_tensors, run

YAML_TEXT = """
base: clip-base
experts:
- {path: clip-mnist, coefficient: 0.3}
- {path: clip-svhn}
method: {name: ties, density: 0.2}
"""


def test_three_doors_one_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(YAML_TEXT)
    by_flags = recipe_from_flags(
        base="clip-base",
        experts=["clip-mnist:0.3", "clip-svhn"],
        method="ties",
        settings=["density=0.2"],
    )
    by_hand = Recipe(
        base="clip-base",
        experts=(Expert(path="clip-mnist", coefficient=0.3), Expert(path="clip-svhn")),
        method=MethodChoice.model_validate({"name": "ties", "density": 0.2}),
    )
    assert read_recipe(file) == by_flags == by_hand
    assert by_flags.digest() == by_hand.digest()


def test_paths_are_relative_to_the_recipe_where_they_exist(tmp_path: Path) -> None:
    (tmp_path / "clip-mnist").mkdir()
    file = tmp_path / "recipe.yaml"
    file.write_text(YAML_TEXT)
    recipe = read_recipe(file)
    assert recipe.experts[0].path == str(tmp_path / "clip-mnist")
    assert recipe.experts[1].path == "clip-svhn"


def test_a_recipe_written_and_read_again_is_the_same() -> None:
    recipe = make_recipe(
        {
            "base": "b",
            "experts": [{"path": "a"}],
            "method": {"name": "dare", "density": 0.25, "rescale": "norm"},
            "rules": [
                {"match": "*.bias", "method": {"name": "average"}},
                {"match": "x", "omit": True},
            ],
            "seed": 4,
        }
    )
    assert make_recipe(YAML(typ="safe").load(recipe.to_yaml())) == recipe


def test_the_digest_tells_recipes_apart_but_not_defaults_written_out() -> None:
    def of(**method: object) -> str:
        return make_recipe({"experts": [{"path": "a"}], "method": method}).digest()

    assert of(name="ties") == of(name="ties", density=0.2) != of(name="ties", density=0.3)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, "no expert is named"),
        ({"experts": []}, "no expert is named"),
        ({"experts": [{"path": "a"}], "method": {"name": "tise"}}, "did you mean 'ties'"),
        (
            {"experts": [{"path": "a"}], "method": {"name": "ties", "denisty": 1}},
            "did you mean 'dens",
        ),
        (
            {"experts": [{"path": "a"}], "method": {"name": "ties", "density": 0}},
            "density = 0 is ref",
        ),
        (
            {"experts": [{"path": "a"}], "method": {"name": "ties", "elect": "x"}},
            "elect = 'x' is ref",
        ),
        ({"experts": [{"path": "a"}], "bsae": "b"}, "no parameter 'bsae': did you mean 'base'"),
        ({"experts": [{"path": "a", "coefficient": float("nan")}]}, "coefficient"),
        (
            {"experts": [{"path": "a"}], "rules": [{"match": "x", "coefficients": [1, 2]}]},
            "2 coeff",
        ),
        ({"experts": [{"path": "a"}], "rules": [{"match": "x", "method": {"name": "y"}}]}, "'y'"),
    ],
)
def test_what_is_no_recipe_gets_a_sentence(data: dict, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence) as caught:
        make_recipe(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "\t", "", "experts: 3", "\x00", "&a [*a]"])
def test_what_is_no_yaml_gets_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        read_recipe(file)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["base", "experts", "method", "rules", "seed", "dtype", "x"]),
        plain,
        max_size=5,
    )
)
def test_any_data_is_a_recipe_or_a_named_error(data: dict) -> None:
    try:
        make_recipe(data)
    except MergewellError as error:
        assert str(error)


def test_flags_that_cannot_be_read() -> None:
    for setting in ("density", "=3", "x=["):
        with pytest.raises(RecipeError, match="--set"):
            recipe_from_flags(base=None, experts=["a"], method="ties", settings=[setting])


def test_a_manifest_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the merge was run it is the very same, elsewhere its paths are found all the same."""
    family(tmp_path / "models", experts=2)
    recipe = make_recipe(
        {
            "base": "models/base",
            "experts": [{"path": "models/expert0", "coefficient": 0.5}, {"path": "models/expert1"}],
            "method": {"name": "dare", "density": 0.5},
            "rules": [{"match": "*.bias", "method": {"name": "average"}}],
            "seed": 3,
        }
    )
    monkeypatch.chdir(tmp_path)
    run(make_plan(recipe), "out", workers=1)
    assert read_recipe("out/manifest.json") == recipe
    run(make_plan(read_recipe("out/manifest.json")), "again", workers=1)
    name = "model.safetensors"
    assert Path("again", name).read_bytes() == Path("out", name).read_bytes()
    Path("out/manifest.json").rename("kept.json")
    monkeypatch.chdir("/")
    moved = read_recipe(tmp_path / "kept.json")
    assert moved.experts[0].path == str(tmp_path / "models" / "expert0")
    assert moved.rules == recipe.rules and moved.seed == 3
    tensors = dict(merge_tensors(make_plan(moved)))
    stored = load_file(tmp_path / "out" / name)
    assert all(torch.equal(tensors[n], stored[n]) for n in stored)


def test_a_manifest_that_is_no_recipe_gets_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    held = {
        "version": 1, "recipe": {}, "inputs": [], "outputs": [], "tensors": 1,
        "tensors_changed": 1, "seed": 0, "versions": {}, "seconds": 1.0,
    }  # fmt: skip
    file.write_text(json.dumps({**held, "repair": {"kind": "batch_norm", "of": "/there/merged"}}))
    with pytest.raises(RecipeError, match=r"manifest\.json is of a folder that `mergewell repair`"):
        read_recipe(file)
    file.write_text(json.dumps({**held, "recipe": {"experts": [{"path": "a", "x": 1}]}}))
    with pytest.raises(RecipeError, match=r"manifest\.json has no parameter"):
        read_recipe(file)
    file.write_text(json.dumps({**held, "seed": "x"}))
    with pytest.raises(CheckpointError, match="'seed'"):
        read_recipe(file)
    file.write_text(json.dumps({"experts": [{"path": "a"}]}))
    assert read_recipe(file).experts[0].path == "a", "a recipe may be JSON under any name"
