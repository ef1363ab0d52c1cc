"""Vocabularies: differences are named, and joint ones put every row in its place."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import save

from mergewell.errors import CheckpointError, PlanError, RecipeError
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe, read_recipe
from mergewell.run import merge_tensors, run
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.tokenizers.view import tables_of
from mergewell.tokenizers.vocabulary import read_vocabulary

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def words(tokens: Sequence[str], added: Sequence[str] = (), kind: str = "WordLevel") -> str:
    """Return a tokenizer.json of words, numbered as they stand."""
    vocab: Any = {token: number for number, token in enumerate(tokens)}
    if kind == "Unigram":
        vocab = [[token, 0.0] for token in tokens]
    entries = [
        {"id": len(tokens) + i, "content": token, "special": True, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
        for i, token in enumerate(added)
    ]  # fmt: skip
    split = {"type": "WhitespaceSplit"}
    model = {"type": kind, "vocab": vocab, "unk_token": tokens[0]}
    return json.dumps(
        {"version": "1.0", "added_tokens": entries, "pre_tokenizer": split, "model": model}
    )


def model(
    folder: Path,
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    added: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a model of two inputs whose rows hold `values`, and ten times that in its head."""
    rows = torch.tensor(values, dtype=torch.float32)[:, None].repeat(1, 2)
    layer = {"model.layers.0.up.weight": torch.full((3, 2), float(len(values)))}
    save(folder, {TABLE: rows, HEAD: 10 * rows, **layer, **(more or {})}, torch.float32)
    config = {"model_type": "llama", "vocab_size": len(values), "eos_token_id": 1, "hidden_size": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(words(tokens, added))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """A base of a, b and c; one expert adds x, the other y and x."""
    return [
        str(model(tmp_path / "base", "abc", [0, 1, 2])),
        str(model(tmp_path / "one", "abc", [2, 3, 4, 30], added="x")),
        str(model(tmp_path / "two", "abc", [4, 5, 6, 40, 50], added="yx")),
    ]


def recipe_of(models: Sequence[str], **more: Any) -> Recipe:
    experts = [{"path": path} for path in models[1:]]
    return make_recipe({"base": models[0], "experts": experts, **more})


def merged(recipe: Recipe, name: str = TABLE) -> list[float]:
    table = dict(merge_tensors(make_plan(recipe)))[name]
    assert torch.equal(table[:, 0], table[:, 1])
    return table[:, 0].tolist()


def test_a_planted_difference_is_named(tmp_path: Path) -> None:
    base = model(tmp_path / "base", ["a", "b", "c", "d"], [0, 1, 2, 3])
    swapped = model(tmp_path / "swapped", ["a", "c", "b", "d"], [0, 1, 2, 3])
    renamed = model(tmp_path / "renamed", ["a", "b", "q", "d"], [0, 1, 2, 3])
    with pytest.raises(PlanError, match=r"2 of its tokens .*'c' is 1 here and 2 there"):
        make_plan(recipe_of([str(base), str(swapped)]))
    with pytest.raises(PlanError, match=r"2 is 'q' here and 'c' there.*source: base"):
        make_plan(recipe_of([str(base), str(renamed)]))


def test_tokens_templates_and_special_tokens_of_one_model_are_warned_of(tmp_path: Path) -> None:
    used = {"chat_template": "{{ a }}", "eos_token": {"content": "b"}}
    base = model(tmp_path / "base", "abc", [0, 1, 2, 3], settings={"eos_token": "c"})
    other = model(tmp_path / "other", "abc", [0, 1, 2, 5], added="x", settings=used)
    warnings = make_plan(recipe_of([str(base), str(other)])).warnings
    assert any("1 tokens that" in w and "'x'" in w and "union" in w for w in warnings)
    assert any("chat template" in w and "has no one" in w for w in warnings)
    assert any("eos_token is 'b', but 'c'" in w for w in warnings)
    assert len(warnings) == 3


def test_other_shapes_are_refused_without_a_choice(three: list[str]) -> None:
    with pytest.raises(PlanError, match=r"one: .* 4 rows, with 1 tokens that only it has \('x'\)"):
        make_plan(recipe_of(three))
    with pytest.raises(
        PlanError, match=r"base: .* 3 rows, with 1 tokens that only .*one has \('x'"
    ):
        make_plan(recipe_of([three[1], three[0]]))
    for path in three:
        (Path(path) / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match="vocab_size = 4"):
        make_plan(recipe_of(three))


def test_a_union_has_all_tokens(three: list[str], tmp_path: Path) -> None:
    recipe = recipe_of(three, tokenizer={"source": "union"})
    # x: 30 and 50, the base takes their mean; y: only the second has it, so all take its row
    assert merged(recipe) == [3, 4, 5, 40, 40]
    assert merged(recipe, HEAD) == [30, 40, 50, 400, 400]
    run(make_plan(recipe), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 5
    found = read_vocabulary((tmp_path / "out/tokenizer.json",))
    assert found is not None
    assert found.numbers == {"a": 0, "b": 1, "c": 2, "x": 3, "y": 4}
    assert found.added["y"]["special"] is True
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert any(file["path"].endswith("two/tokenizer.json") for file in manifest["inputs"])


def test_blocks_of_a_joint_table_are_its_parts(three: list[str]) -> None:
    plan = make_plan(recipe_of(three, tokenizer={"source": "union"}))
    for view in plan.inputs:
        whole = view.read(TABLE)
        assert torch.equal(torch.cat([view.read(TABLE, i, i + 1) for i in range(10)]), whole)
        assert torch.equal(view.read(TABLE, 3, 9), whole[3:9])
    assert plan.inputs[2].read(TABLE).tolist()[::2] == [4, 5, 6, 50, 40]


def test_the_bases_vocabulary(three: list[str]) -> None:
    assert merged(recipe_of(three, tokenizer={"source": "base"})) == [3, 4, 5]


def test_a_models_vocabulary_renumbers_special_tokens(three: list[str], tmp_path: Path) -> None:
    other = str(model(tmp_path / "other", "bca", [7, 8, 9]))
    recipe = recipe_of([three[0], other], tokenizer={"source": other})
    assert merged(recipe) == [7, 8, 9]
    run(make_plan(recipe), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == 0
    assert (tmp_path / "out/tokenizer.json").read_text() == words("bca")
    base = make_plan(recipe_of([three[0], other], tokenizer={"source": "base"}))
    assert base.inputs[1].read(TABLE).tolist()[::2] == [9, 7, 8]


def test_a_transplant_fills_what_no_model_has(three: list[str], tmp_path: Path) -> None:
    donor = tmp_path / "donor"
    donor.mkdir()
    (donor / "tokenizer.json").write_text(words("cz"))
    choice = {"source": str(donor)}
    models = [three[0], str(model(tmp_path / "other", "abc", [3, 6, 9]))]
    assert merged(recipe_of(models, tokenizer=choice)) == [9, 0]
    plan = make_plan(recipe_of(models, tokenizer={**choice, "missing": "mean"}))
    assert dict(merge_tensors(plan))[TABLE][:, 0].tolist() == [9, 6]
    assert any("'z'" in w and "mean of all" in w for w in plan.warnings)


def test_a_transplant_may_put_pieces_together(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    base, other = (str(model(tmp_path / n, "uab", [0, 2, 4])) for n in ("base", "other"))
    pieces = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"u": 0, "a": 1, "##b": 2}, unk_token="u")
    )
    pieces.save(str(Path(other) / "tokenizer.json"))
    pieces.save(str(Path(base) / "tokenizer.json"))
    (tmp_path / "donor").mkdir()
    (tmp_path / "donor" / "tokenizer.json").write_text(words(["u", "ab", "zz"]))
    choice = {"source": str(tmp_path / "donor"), "missing": "pieces"}
    plan = make_plan(recipe_of([base, other], tokenizer=choice))
    assert dict(merge_tensors(plan))[TABLE][:, 0].tolist() == [0, 3, 0]
    assert any("'ab'" in w and "means of their pieces" in w for w in plan.warnings)
    (Path(other) / "tokenizer.json").rename(Path(other) / "vocab.json")
    (Path(other) / "vocab.json").write_text('{"u": 0, "a": 1, "##b": 2}')
    with pytest.raises(PlanError, match="which `missing: pieces` needs"):
        make_plan(recipe_of([base, other], tokenizer=choice))


def test_single_tokens_have_sources(three: list[str]) -> None:
    def rows(**tokens: Any) -> list[float]:
        return merged(recipe_of(three, tokenizer={"source": "union", "tokens": tokens}))[3:]

    # x of the second for the base alone: of the experts it is the mean of their own all the same
    assert rows(x={"model": three[2]}) == [40, 40]
    assert rows(x={"model": three[2], "force": True}) == [50, 40]
    assert rows(y={"model": three[0], "token": "c"}) == [40, 21]
    assert rows(y={"model": three[1], "id": 1, "force": True}) == [40, 3]
    assert rows(y={"force": True}) == [40, 0]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"q": {}}, "'q' is in no vocabulary"),
        ({"x": {"model": "nowhere"}}, "nowhere, which is not merged"),
        ({"y": {"model": 0}}, "has no 'y'"),
        ({"y": {"model": 0, "id": 9}}, "has no row 9"),
    ],
)
def test_sources_that_do_not_exist(three: list[str], tokens: dict[str, Any], words: str) -> None:
    for source in tokens.values():
        if "model" in source and isinstance(source["model"], int):
            source["model"] = three[source["model"]]
    with pytest.raises(PlanError, match=words):
        make_plan(recipe_of(three, tokenizer={"source": "union", "tokens": tokens}))


def test_rows_of_no_token_stay_and_padding_is_the_mean(tmp_path: Path) -> None:
    base = str(model(tmp_path / "base", "abc", [0, 1, 2, 100]))
    one = str(model(tmp_path / "one", "abc", [2, 3, 4, 200, 5], added=["y", "x"]))
    recipe = recipe_of([base, one], tokenizer={"source": "base", "pad_to_multiple_of": 3})
    view, expert = make_plan(recipe).inputs
    # row 3 is nobody's in the base but y's in the expert, which takes the base's
    assert view.read(TABLE).tolist()[::2] == [0, 1, 2, 100, 25.75, 25.75]
    assert expert.read(TABLE).tolist()[::2][:4] == [2, 3, 4, 100]
    assert view.config is not None
    assert view.config["vocab_size"] == 6


def test_templates_are_chosen(tmp_path: Path) -> None:
    folders = [
        str(model(tmp_path / name, "abc", [i, 1, 2], settings={"chat_template": text}))
        for i, (name, text) in enumerate([("base", "{{ 1 }}"), ("a", "{{ 2 }}"), ("b", "{{ 2 }}")])
    ]
    plan = make_plan(recipe_of(folders, tokenizer={"chat_template": "auto"}))
    run(plan, tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ 2 }}"
    assert "chat_template" not in (tmp_path / "out/tokenizer_config.json").read_text()
    with pytest.raises(PlanError, match="'chatml' is neither auto nor a template"):
        make_plan(recipe_of(folders, tokenizer={"chat_template": "chatml"}))


def test_ordinary_tokens_join_words_and_follow_pieces(tmp_path: Path) -> None:
    base, other = (model(tmp_path / n, t, range(len(t))) for n, t in [("b", "ab"), ("o", "abq")])
    recipe = recipe_of([str(base), str(other)], tokenizer={"source": "union"})
    assert make_plan(recipe).warnings == ()
    (base / "tokenizer.json").write_text(words("ab", kind="Unigram"))
    plan = make_plan(recipe)
    assert any("'q'" in warning and "as they stand" in warning for warning in plan.warnings)
    path = next(f for f in plan.reference.side_files if f.name == "tokenizer.json")
    data = json.loads(plan.reference.side_file(path))
    assert [(e["content"], e["id"], e["special"]) for e in data["added_tokens"]] == [
        ("q", 2, False)
    ]


def test_other_forms_of_a_vocabulary(tmp_path: Path) -> None:
    def pieces(*texts: str) -> bytes:
        inner = (
            b"\x0a" + bytes([len(t)]) + t + b"\x15" + struct.pack("<f", -1)
            for t in map(str.encode, texts)
        )
        return b"".join(b"\x0a" + bytes([len(m)]) + m for m in inner) + b"\x12\x02\x18\x01"

    (tmp_path / "tokenizer.model").write_bytes(pieces("<s>", "▁a"))
    (tmp_path / "vocab.txt").write_text("u\nv\n")
    (tmp_path / "vocab.json").write_text('{"g": 1, "h": 0}')
    (tmp_path / "added_tokens.json").write_text('{"<x>": 2}')

    def numbers(*names: str) -> Mapping[str, int]:
        found = read_vocabulary(tuple(tmp_path / name for name in names))
        assert found is not None
        return found.numbers

    assert numbers("tokenizer.model") == {"<s>": 0, "▁a": 1}
    assert numbers("vocab.txt") == {"u": 0, "v": 1}
    assert numbers("vocab.json", "added_tokens.json") == {"g": 1, "h": 0, "<x>": 2}
    assert read_vocabulary((tmp_path / "merges.txt",)) is None
    (tmp_path / "tokenizer.model").write_bytes(b"\x0f\x0f")
    with pytest.raises(CheckpointError, match="no SentencePiece model"):
        numbers("tokenizer.model")
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(CheckpointError, match="holds no vocabulary"):
        numbers("tokenizer.json")


def test_a_choice_that_chooses_nothing_is_refused(three: list[str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="need a source"):
        recipe_of(three, tokenizer={"pad_to_multiple_of": 8})
    with pytest.raises(PlanError, match="no folder with a tokenizer"):
        make_plan(recipe_of(three, tokenizer={"source": str(tmp_path / "absent")}))
    (Path(three[0]) / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match="no tokenizer to begin with"):
        make_plan(recipe_of(three, tokenizer={"source": "union"}))


def test_recipes_without_a_tokenizer_keep_their_digest(three: list[str], tmp_path: Path) -> None:
    assert recipe_of(["b", "e"]).digest() == "0f2e7ef21736bac7"
    one = recipe_of(["base", "one"], tokenizer={"source": "one"})
    (tmp_path / "recipe.yaml").write_text(one.to_yaml())
    read = read_recipe(tmp_path / "recipe.yaml").tokenizer
    assert read is not None
    assert read.source == three[1]


def test_tables_are_told_by_name_and_rows(tmp_path: Path) -> None:
    names = {"transformer.wpe.weight": torch.zeros(3, 2), "model.norm.weight": torch.zeros(3),
             "cls.predictions.bias": torch.zeros(3)}  # fmt: skip
    folder = model(tmp_path / "m", "abc", [0, 1, 2], more=names)
    with open_checkpoint(folder) as found:
        assert tables_of(found) == {TABLE: 3, HEAD: 3, "cls.predictions.bias": 3}


def test_a_joint_model_is_one_for_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from language_toys import MODELS, WORDS, loaded, saved

    texts = [f"w{i}" for i in range(WORDS)]
    torch.manual_seed(0)
    module = MODELS["qwen2 tied"]()
    base = saved(module, tmp_path / "base")
    module.resize_token_embeddings(WORDS + 2, mean_resizing=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    expert = saved(module, tmp_path / "expert")
    for folder, added in [(base, ()), (expert, ("<|im_start|>", "<|im_end|>"))]:
        (folder / "tokenizer.json").write_text(words(texts, added))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"}
        listed = {"additional_special_tokens": [*added[1:]]} if added else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | listed))
    recipe = recipe_of([str(base), str(expert)], tokenizer={"source": "union"})
    run(make_plan(recipe), tmp_path / "out")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    given = tokenizer("w3 <|im_end|> w4", return_tensors="pt")["input_ids"]
    assert given.tolist() == [[3, WORDS + 1, 4]]
    # what no model lists as special is none by name, but is left out of texts all the same
    assert {*tokenizer.all_special_tokens} == {"w2", "<|im_end|>"}
    assert tokenizer.decode([3, WORDS, WORDS + 1], skip_special_tokens=True) == "w3"
    result = loaded("qwen2 tied", tmp_path / "out")
    table = load_file(tmp_path / "out/model.safetensors")[TABLE]
    assert torch.equal(table, module.state_dict()[TABLE])
    assert torch.equal(result(given).logits, module.eval()(given).logits)
    assert result.generate(given, max_new_tokens=3, min_new_tokens=3).shape == (1, 6)
