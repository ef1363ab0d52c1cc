"""mergekit's YAML: the five shapes, parity with its own numbers, and refusals by name."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import save_adapter
from parity.mergekit_cases import (
    DETERMINISTIC,
    LAYERS,
    RANDOM,
    models,
    moments,
    slices,
    state,
    write_models,
)
from ruamel.yaml import YAML
from torch import Tensor

from mergewell.errors import RecipeError, UserError
from mergewell.mergekit import is_mergekit, recipe_from_mergekit
from mergewell.methods.base import METHODS
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe, read_recipe
from mergewell.run import merge_tensors, run

_QUERY = "model.layers.0.self_attn.q_proj.weight"
PARITY = Path(__file__).parent / "parity" / "mergekit"


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four Llama-shaped models in float32."""
    return write_models(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bfloat16."""
    return write_models(tmp_path_factory.mktemp("halves"), dtype=torch.bfloat16)


def converted(data: Mapping[str, Any], folder: Path) -> Recipe:
    return recipe_from_mergekit(data, where="x.yaml", base_dir=folder)


def merged(data: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    return dict(merge_tensors(make_plan(converted(data, folder))))


def treatment(recipe: Recipe, name: str) -> tuple[dict[str, Any], tuple[float, ...]]:
    """Return the method and the coefficients that a recipe gives a tensor."""
    rule = recipe.rule_for(name)
    choice = rule.method if rule is not None and rule.method is not None else recipe.method
    return choice.model_dump(), recipe.coefficients_for(rule)


# Parity ------------------------------------------------------------------------------------------


def table(name: str) -> dict[str, Any]:
    return json.loads((PARITY / f"{name}.json").read_text())


def expected(found: Mapping[str, Any], kind: str) -> dict[str, Tensor]:
    dtype = getattr(torch, kind)
    return {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)
        for name, text in found[kind].items()
    }


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_float32_agrees_with_mergekit(name: str, toys: Path) -> None:
    found = table(name)
    assert found["config"] == DETERMINISTIC[name], "make the table again"
    ours = merged({**found["config"], "dtype": "float32"}, toys)
    theirs = expected(found, "float32")
    assert ours.keys() == theirs.keys()
    for tensor, values in theirs.items():
        sample = ours[tensor].flatten()[:: found["stride"]]
        torch.testing.assert_close(
            sample, values, rtol=2e-5, atol=2e-6, msg=lambda m, t=tensor: f"{t}: {m}"
        )


def steps_apart(ours: Tensor, theirs: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return the distance in bfloat16 steps, those of the largest of inputs and results.

    mergekit rounds every intermediate result to bfloat16, so that its error is one of the inputs'
    size even where they cancel.
    """
    largest = torch.stack([t.abs().double() for t in (ours, theirs, *inputs)]).amax(0)
    step = 2.0 ** (largest.clamp(min=2.0**-126).log2().floor() - 7)
    return (ours.double() - theirs.double()).abs() / step


_BITS = "it rounds weights, products, sums and quotients: four half steps"
_TRIM = "it ranks task vectors, and votes with sums, that were rounded to bfloat16"
BEYOND: Mapping[str, tuple[float, str]] = {
    "linear": (0.015, _BITS),
    "ties": (0.015, _TRIM),
    "ties_gradients": (0.015, _TRIM),
    "ties_negative": (0.02, _TRIM),
    "ties_rescale": (0.03, _TRIM),
    "breadcrumbs": (0.015, _TRIM),
    "nuslerp_rows": (0.015, _BITS),
    "nuslerp_columns": (0.02, _BITS),
    "multislerp": (0.02, _BITS),
    "multislerp_base": (0.015, _BITS),
    "model_stock_rows": (0.06, "the cosines of rows are rounded, and t turns on them"),
    "karcher_base": (0.10, "cosines near 1 round to 1, which it takes for one direction"),
}
"""Where more than a hundredth of the elements lie beyond one step: the fraction and the reason."""


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_bfloat16_agrees_to_a_step(name: str, halves: Path) -> None:
    found = table(name)
    ours = merged({**found["config"], "dtype": "bfloat16"}, halves)
    states = [state(model, dtype=torch.bfloat16) for model in ("BASE", "A", "B", "C")]
    apart: list[Tensor] = []
    for tensor, values in expected(found, "bfloat16").items():
        sample = ours[tensor].flatten()[:: found["stride"]]
        inputs = [s[tensor].flatten()[:: found["stride"]] for s in states if tensor in s]
        apart.append(steps_apart(sample, values, inputs))
    fraction = float((torch.cat(apart) > 1).double().mean())
    assert fraction <= BEYOND.get(name, (0.01, ""))[0], f"{fraction:.4f} beyond one step"


@pytest.mark.parametrize("name", RANDOM)
def test_random_methods_agree_in_distribution(name: str, toys: Path) -> None:
    """Kept fraction, norms and sum over seeds lie within 4 standard errors of mergekit's."""
    found = table(name)
    assert found["config"] == RANDOM[name], "make the table again"
    recipe = converted({**found["config"], "dtype": "float32"}, toys)
    runs = [
        moments(dict(merge_tensors(make_plan(recipe.model_copy(update={"seed": seed})))))
        for seed in range(20)
    ]
    for key in ("kept", "l1", "l2", "sum"):
        ours = [run[key] for run in runs]
        mean, deviation = found[key]
        error = (deviation**2 / found["seeds"] + deviation**2 / len(ours)) ** 0.5
        assert abs(float(np.mean(ours)) - mean) < 4 * error, key
        assert 0.5 < float(np.std(ours, ddof=1)) / deviation < 2, key


def test_the_comparison_would_see_a_difference(toys: Path) -> None:
    data = {**DETERMINISTIC["ties"], "dtype": "float32", "parameters": {"lambda": 0.99}}
    ours, theirs = merged(data, toys), expected(table("ties"), "float32")
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours[name].flatten()[::3], theirs[name], rtol=2e-5, atol=2e-6)


# The five shapes of reference/mergekit.md, section 2 ---------------------------------------------

SHAPES = {
    "linear": """
{merge_method: linear, dtype: bfloat16, models: [{model: A, parameters: {weight: 1.0}},
 {model: B, parameters: {weight: 0.3}}]}""",
    "ties": """
{merge_method: ties, base_model: BASE, dtype: bfloat16, parameters: {normalize: true, lambda: 1.1},
 models: [{model: A, parameters: {weight: 0.5, density: 0.6}},
          {model: B, parameters: {weight: [0.1, 0.9], density: [0.2, 0.8]}}]}""",
    "slerp": """
{merge_method: slerp, base_model: A, dtype: bfloat16,
 slices: [{sources: [{model: A, layer_range: [0, 4]}, {model: B, layer_range: [0, 4]}]}],
 parameters: {t: [{filter: self_attn, value: [0, 0.5, 1]}, {filter: mlp, value: [1, 0.5, 0]},
                  {value: 0.5}]}}""",
    "passthrough": """
{merge_method: passthrough, dtype: bfloat16, slices: [{sources: [{model: A, layer_range: [0, 3]}]},
 {sources: [{model: B, layer_range: [1, 4]}]}]}""",
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_plan_and_run(name: str, halves: Path, tmp_path: Path) -> None:
    file = halves / f"{name}.yaml"
    file.write_text(SHAPES[name])
    recipe = read_recipe(file)
    assert make_recipe(YAML(typ="safe").load(recipe.to_yaml())) == recipe
    manifest = run(make_plan(recipe), tmp_path / "out")
    layers = 6 if name == "passthrough" else LAYERS
    assert manifest.tensors == 3 + 9 * layers
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == layers


def test_the_fifth_shape(halves: Path) -> None:
    text = """
{merge_method: dare_ties, base_model: BASE, dtype: bfloat16, tokenizer_source: union,
 models: [{model: A, parameters: {weight: 0.4, density: 0.5}},
          {model: B+ADAPTER, parameters: {weight: 0.4, density: 0.5}}]}"""
    file = halves / "fifth.yaml"
    file.write_text(text)
    query = state("B", dtype=torch.bfloat16)[_QUERY]
    factors = {"A": torch.ones(1, query.shape[1]), "B": torch.ones(query.shape[0], 1)}
    place = _QUERY.removesuffix(".weight")
    adapter = save_adapter(
        halves / "ADAPTER", {f"{place}.lora_{name}.weight": t for name, t in factors.items()}
    )
    recipe = read_recipe(file)
    assert recipe.experts[1].path == f"{halves / 'B'}+{adapter}"
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.source == "union"
    plan = make_plan(recipe)
    assert len(plan.tasks) == 3 + 9 * LAYERS
    assert plan.tasks[_QUERY].spec.dtype == torch.bfloat16
    torch.testing.assert_close(plan.experts[1][_QUERY], query.double() + 2, rtol=0, atol=0)
    assert any("No model has a tokenizer" in warning for warning in plan.warnings)


def test_a_recipe_of_ours_is_not_taken_for_one_of_mergekit() -> None:
    assert not is_mergekit({"experts": [], "method": {"name": "ties"}})
    assert not is_mergekit({"base": "x"})
    assert is_mergekit({"merge_method": "ties"})
    assert is_mergekit({"models": []})
    assert is_mergekit({"slices": []})


def test_the_plan_says_what_every_tensor_got(halves: Path) -> None:
    (halves / "said.yaml").write_text(SHAPES["slerp"])
    said = make_plan(read_recipe(halves / "said.yaml")).as_data(1)["tensors"]
    by_name = {tensor["name"]: tensor["parameters"]["t"] for tensor in said}
    assert by_name["model.layers.0.mlp.up_proj.weight"] == 1.0
    assert by_name["model.layers.3.self_attn.q_proj.weight"] == 1.0
    assert by_name["model.norm.weight"] == 0.5


# What becomes of the parameters ------------------------------------------------------------------


def test_equal_tensors_need_no_rule(toys: Path) -> None:
    recipe = converted(DETERMINISTIC["ties"], toys)
    assert recipe.rules == ()
    assert recipe.method.model_dump() == {
        "name": "ties", "density": [0.6, 0.3], "combine": "agreeing", "votes": "weighted",
        "divide": "coefficients", "scale": 1.0,
    }  # fmt: skip
    assert [expert.coefficient for expert in recipe.experts] == [0.7, 0.5]


def test_filters_without_gradient_are_one_rule_each(toys: Path) -> None:
    t = [{"filter": "mlp", "value": 0.1}, {"filter": "norm", "value": 0.2}, {"value": 0.3}]
    recipe = converted({**DETERMINISTIC["slerp"], "parameters": {"t": t}}, toys)
    given = {rule.match: rule.method.model_dump() for rule in recipe.rules if rule.method}
    assert given == {"*mlp*": {"name": "slerp", "t": 0.1}, "*norm*": {"name": "slerp", "t": 0.2}}
    assert recipe.method.model_dump() == {"name": "slerp", "t": 0.3}


def test_gradients_run_over_the_layers_of_a_slice_and_begin_outside(toys: Path) -> None:
    """As mergekit has it: t is 0 before and after the layers, and 1 in a slice of one layer."""
    data = {
        "merge_method": "linear",
        "models": models(("A", {"weight": [0, 0.6]}), ("B", {"weight": 1})),
    }
    recipe = converted(data, toys)
    weights = {
        name: treatment(recipe, name)[1][0]
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    }
    assert set(weights.values()) == {0.0}
    by_layer = [treatment(recipe, f"model.layers.{i}.mlp.up_proj.weight")[1] for i in range(4)]
    assert by_layer == [(0, 1), (pytest.approx(0.2), 1), (pytest.approx(0.4), 1), (0.6, 1)]
    assert [rule.match for rule in recipe.rules] == [f"model.layers.{i}.*" for i in (1, 2, 3)]
    single = {**data, "slices": slices([("A", 0, 1), ("B", 0, 1)])}
    del single["models"]
    single["slices"][0]["sources"][0]["parameters"] = {"weight": [0, 0.6]}
    single["slices"][0]["sources"][1]["parameters"] = {"weight": 1}
    assert treatment(converted(single, toys), "model.layers.0.mlp.up_proj.weight")[1] == (0.6, 1)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_rules_give_every_tensor_what_was_asked(name: str, toys: Path) -> None:
    """The rules, however few, resolve to what each tensor gets on its own."""
    from mergewell.mergekit.config import read_config
    from mergewell.mergekit.convert import Conversion

    config = read_config(DETERMINISTIC[name], where="x", base_dir=toys)
    conversion = Conversion(config, "x")
    recipe = conversion.recipe()
    for tensor in conversion.names:
        wanted = conversion.treatment(tensor)
        method, coefficients = treatment(recipe, tensor)
        assert (method, coefficients) == (wanted.method_data(), wanted.coefficients), tensor


def test_precedence_is_source_slice_global(toys: Path) -> None:
    data: dict[str, Any] = {
        "merge_method": "linear",
        "slices": slices([("A", 0, 4), ("B", 0, 4)]),
        "parameters": {"weight": 0.1},
    }
    name = "model.layers.2.mlp.up_proj.weight"
    assert treatment(converted(data, toys), name)[1] == (0.1, 0.1)
    data["slices"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 0.2}]}
    assert treatment(converted(data, toys), name)[1] == (0.2, 0.2)
    assert treatment(converted(data, toys), "lm_head.weight")[1] == (0.1, 0.1)
    data["slices"][0]["sources"][1]["parameters"] = {"weight": 0.3}
    assert treatment(converted(data, toys), name)[1] == (0.2, 0.3)


def test_slices_of_different_models_stack_by_place(toys: Path) -> None:
    recipe = converted(DETERMINISTIC["slerp_slices"], toys)
    found = [
        [(Path(r.path or expert.path).name, r.start, r.stop) for r in expert.layers]
        for expert in recipe.experts
    ]
    assert found == [[("A", 0, 3), ("A", 2, 4)], [("B", 1, 4), ("B", 0, 2)]]


def test_filters_see_the_names_in_the_source_and_the_last_slice_rules_what_comes_after(
    toys: Path,
) -> None:
    data: dict[str, Any] = {
        "merge_method": "linear",
        "slices": slices([("A", 2, 4), ("B", 0, 2)], [("A", 0, 1), ("B", 3, 4)]),
        "parameters": {"weight": 1},
    }
    sources = data["slices"][0]["sources"]
    sources[0]["parameters"] = {"weight": [{"filter": "layers.3.", "value": 0.5}]}
    data["slices"][1]["sources"][1]["parameters"] = {"weight": 0.25}
    recipe = converted(data, toys)
    rests = ("0.mlp.up_proj.weight", "1.mlp.up_proj.weight", "2.mlp.up_proj.weight")
    found = [treatment(recipe, f"model.layers.{rest}")[1] for rest in rests]
    assert found == [(1, 1), (0.5, 1), (1, 0.25)]
    assert treatment(recipe, "model.embed_tokens.weight")[1] == (1, 1)
    assert treatment(recipe, "model.norm.weight")[1] == (1, 0.25)


def test_densities_above_one_keep_everything_as_there(toys: Path) -> None:
    data = {**_TIES, "models": models(("A", {"weight": 1})), "parameters": {"density": 1.5}}
    assert converted(data, toys).method.model_dump()["density"] == 1.0


def test_sce_keeps_the_threshold_of_mergekit(toys: Path) -> None:
    """Below it, as in most fine-tunes of bf16 models, all experts weigh the same there."""
    made = converted(DETERMINISTIC["sce"], toys).method.model_dump()
    assert made == {"name": "sce", "density": 0.4, "least": 1e-6}


def test_whole_models_in_slices_are_not_stacked(toys: Path) -> None:
    recipe = converted(DETERMINISTIC["slerp"], toys)
    assert all(not expert.layers for expert in recipe.experts)
    pieces = slices([("A", 0, 2)], [("A", 2, 4)])
    halved = converted({"merge_method": "passthrough", "slices": pieces}, toys)
    assert halved.experts[0].layers == ()


def test_a_base_among_the_models_is_no_expert(toys: Path) -> None:
    recipe = converted(DETERMINISTIC["task_arithmetic_normalized"], toys)
    assert recipe.base == str(toys / "BASE")
    assert [Path(expert.path).name for expert in recipe.experts] == ["A", "B"]


def test_slerp_begins_at_base_model(toys: Path) -> None:
    recipe = converted(DETERMINISTIC["slerp_base_second"], toys)
    assert [Path(expert.path).name for expert in recipe.experts] == ["B", "A"]
    assert recipe.base is None


def test_what_has_no_effect_is_said_and_not_part_of_the_digest(toys: Path) -> None:
    recipe = converted(DETERMINISTIC["ties_sum"], toys)
    assert recipe.notes == ("mergekit's int8_mask has no effect on ties.",)
    assert recipe.notes[0] in make_plan(recipe).warnings
    assert recipe.model_copy(update={"notes": ()}).digest() == recipe.digest()


def test_out_dtype_wins(toys: Path) -> None:
    data = {**DETERMINISTIC["linear"], "dtype": "float32", "out_dtype": "bfloat16"}
    assert converted(data, toys).dtype == "bfloat16"


def test_passthrough_that_changes_the_dtype_casts(toys: Path) -> None:
    data = {"merge_method": "passthrough", "models": models(("A", {})), "dtype": "bfloat16"}
    made = merged(data, toys)
    torch.testing.assert_close(
        made["lm_head.weight"], state("A")["lm_head.weight"].bfloat16(), rtol=0, atol=0
    )


# Refusals ----------------------------------------------------------------------------------------

_LINEAR = DETERMINISTIC["linear"]
_TIES = DETERMINISTIC["ties"]
_SLERP = DETERMINISTIC["slerp"]
REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({**_LINEAR, "basemodel": "A"}, "key 'basemodel' is not known, did you mean 'b"),
    "unknown method": ({**_LINEAR, "merge_method": "tees"}, "merge_method 'tees' is not known"),
    "no method": ({"models": _LINEAR["models"]}, "merge_method is missing"),
    "modules": ({**_LINEAR, "modules": {"text": {}}}, "modules: only `default`"),
    "tokenizer": ({**_LINEAR, "tokenizer": {"sauce": "base"}}, "tokenizer: the key 'sauce' is not"),
    "chat template": ({**_LINEAR, "chat_template": "alpaca"}, "chat_template: alpaca is a templ"),
    "two tokenizers": (
        {**_LINEAR, "tokenizer_source": "B", "tokenizer": {}}, "one of tokenizer_source and token",
    ),
    "token of nothing": (
        {**_LINEAR, "tokenizer": {"tokens": {"<x>": {"force": True}}}}, "<x>: `source` is missing",
    ),
    "kind of token": (
        {**_LINEAR, "tokenizer": {"tokens": {"<x>": {"source": {"kind": "one"}}}}}, "<x>: kind:",
    ),
    "dtype": ({**_LINEAR, "dtype": "bfloat"}, "dtype = 'bfloat' is not known, did you mean"),
    "inner dtype": (
        {**_LINEAR, "dtype": "int8", "out_dtype": "float32"}, "dtype = 'int8' is not known",
    ),
    "models and slices": ({**_LINEAR, "slices": []}, "give either `models` or `slices`"),
    "neither": ({"merge_method": "linear"}, "give either `models` or `slices`"),
    "no model": ({**_LINEAR, "models": []}, "models is a list that names at least one"),
    "unknown parameter": (
        {**_LINEAR, "models": models(("A", {"wieght": 1}))},
        "models.0.parameters: linear has no parameter 'wieght', did you mean 'weight'",
    ),
    "parameter of another method": (
        {**_LINEAR, "parameters": {"density": 0.5}}, "linear has no parameter 'density'",
    ),
    "parameter of no model": (
        {**_TIES, "models": models(("A", {"normalize": True}))},
        "normalize is one for all models of ties; move it to `parameters`",
    ),
    "missing weight": (
        {**_LINEAR, "models": models(("A", {"weight": 1}), ("B", {}))},
        "linear needs the parameter 'weight' of .*B for",
    ),
    "missing t": ({**_SLERP, "parameters": {}}, "slerp needs the parameter 't' for"),
    "text": ({**_LINEAR, "parameters": {"weight": "much"}}, "weight = 'much' is refused"),
    "infinite": ({**_LINEAR, "parameters": {"weight": float("inf")}}, "weight = inf is refused"),
    "empty list": ({**_LINEAR, "parameters": {"weight": []}}, r"weight = \[\] is refused"),
    "mixed list": ({**_LINEAR, "parameters": {"weight": [1, {"value": 2}]}}, "is refused"),
    "filter key": (
        {**_LINEAR, "parameters": {"weight": [{"fliter": "mlp", "value": 1}]}},
        "the key 'fliter' is not known, did you mean 'filter'",
    ),
    "nested filter": (
        {**_LINEAR, "parameters": {"weight": [{"value": [{"value": 1}]}]}}, "has filters; flatten",
    ),
    "density": ({**_TIES, "parameters": {"density": 0}, "models": models(("A", {"weight": 1}))},
                "density.* = 0.* is refused"),
    "slerp without base": ({**_SLERP, "base_model": None}, "slerp needs a base_model"),
    "slerp of three": (
        {"merge_method": "slerp", "base_model": "C", "parameters": {"t": 0.5},
         "models": models(("A", {}), ("B", {}))},
        "slerp takes 2 models, but 3 are named",
    ),
    "ties without base": ({**_TIES, "base_model": None}, "ties needs a base_model"),
    "ties without base in a slice": (
        {**_TIES, "models": None, "slices": slices([("A", 0, 2)])},
        "base_model .*BASE is not among the slices.0.sources",
    ),
    "linear with another base": ({**_LINEAR, "base_model": "C"}, "needs the parameter 'weight' of"),
    "passthrough with base": (
        {"merge_method": "passthrough", "base_model": "B", "models": models(("A", {}))},
        "base_model .*B is not among the models",
    ),
    "base twice": (
        {**_TIES, "models": models(("BASE", {}), ("BASE", {}), ("A", {"weight": 1}))},
        "base_model .*BASE is listed twice",
    ),
    "uneven slices": (
        {**_LINEAR, "models": None, "parameters": {"weight": 1},
         "slices": slices([("A", 0, 2), ("B", 0, 2)], [("A", 2, 4)])},
        "have .1, 2. sources, which is not supported",
    ),
    "uneven ranges": (
        {**_LINEAR, "models": None, "slices": slices([("A", 0, 2), ("B", 0, 3)])},
        r"slices.0: the layer ranges have \[2, 3\] layers",
    ),
    "no range": (
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "A"}]}]},
        "layer_range = None is refused",
    ),
    "backward range": (
        {"merge_method": "passthrough", "slices": slices([("A", 3, 1)])}, "layer_range = .* refused"
    ),
    "residual weight": (
        {"merge_method": "passthrough",
         "slices": [{"sources": [{"model": "A", "layer_range": [0, 1]}], "residual_weight": 1}]},
        "slices.0: the key 'residual_weight' is not known",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name: str, toys: Path) -> None:
    data, message = REFUSED[name]
    given = {key: value for key, value in data.items() if value is not None}
    with pytest.raises(RecipeError, match=message) as caught:
        converted(given, toys)
    assert str(caught.value).startswith("x.yaml: ")
    assert "\n" not in str(caught.value)


_ODD = [
    None, 0, -1, 1.5, float("nan"), float("inf"), 10**400, 1e300, True, "", "A", "x+y", "\0", [],
    [[]], {}, [1, 2], [None], [{}], [{"value": 1}], [{"filter": 3, "value": 1}], {"model": {}},
    [0, 99], {1: 2},
]  # fmt: skip


def _places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value inside a configuration."""
    if not isinstance(data, dict | list):
        return []
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return [way for key, value in items for way in ((*at, key), *_places(value, (*at, key)))]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_mutated_configuration_is_a_recipe_or_a_sentence(name: str, toys: Path) -> None:
    rng = random.Random(name)
    for _ in range(20):
        data = copy.deepcopy(DETERMINISTIC[name])
        *path, last = rng.choice(_places(data))
        inner: Any = data
        for key in path:
            inner = inner[key]
        inner[last] = copy.deepcopy(rng.choice(_ODD))
        try:
            make_plan(converted(data, toys))
        except UserError as error:
            assert "\n" not in str(error)


def test_a_method_that_is_not_there_is_refused_by_name(
    toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tuple(name for name in METHODS.names() if name != "ties")
    monkeypatch.setattr(type(METHODS), "names", lambda self: names)
    with pytest.raises(RecipeError, match="ties is not supported yet: it needs the method 'ties'"):
        converted(_TIES, toys)
