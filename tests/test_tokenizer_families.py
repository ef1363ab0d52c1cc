"""Tokenizers of BERT (WordPiece) and T5 (Unigram), as transformers writes them: joined, named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import tokenizers
import transformers
from language_toys import MODELS, WORDS, loaded, saved
from safetensors.torch import load_file

from mergewell.errors import PlanError
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import run

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##er"]
T5 = ["<pad>", "</s>", "<unk>", "▁play", "ing", "er", "▁"]


def filled(tokens: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """Return as many tokens as a toy has words, and then more."""
    return [*tokens, *(f"w{i}" for i in range(len(tokens), WORDS)), *more]


def write_bert(folder: Path, tokens: Sequence[str], special: Sequence[str] = ()) -> None:
    """Write a WordPiece tokenizer as BERT's is, cased."""
    vocab = {token: number for number, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    save_tokenizer(folder, made, special, unk="[UNK]", pad="[PAD]")


def write_t5(folder: Path, tokens: Sequence[str], special: Sequence[str] = ()) -> None:
    """Write a Unigram tokenizer as T5's is."""
    scores = [(token, -float(number)) for number, token in enumerate(tokens)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    save_tokenizer(folder, made, special, unk="<unk>", pad="<pad>")


def save_tokenizer(folder: Path, made: Any, special: Sequence[str], *, unk: str, pad: str) -> None:
    """Let transformers save a tokenizer, with special tokens added."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unk, pad_token=pad)
    fast.add_special_tokens({"additional_special_tokens": [*special]}) if special else None
    fast.save_pretrained(folder)


def pair(name: str, folder: Path, new: int) -> tuple[Path, Path]:
    """Write a base and an expert of so many more words; return their folders."""
    torch.manual_seed(0)
    module = MODELS[name]()
    base = saved(module, folder / "base")
    module.resize_token_embeddings(WORDS + new, mean_resizing=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    return base, saved(module, folder / "expert")


def recipe_of(base: Path, expert: Path, **more: Any) -> Recipe:
    return make_recipe({"base": str(base), "experts": [{"path": str(expert)}], **more})


@pytest.mark.parametrize(
    ("name", "write", "tokens", "ordinary", "special", "table", "text", "due"),
    [
        (
            "bert", write_bert, BERT, "##zy", "[NEW]", "bert.embeddings.word_embeddings.weight",
            "playing [NEW] playzy", [2, 5, 6, WORDS + 1, 5, WORDS, 3],
        ),
        (
            "t5", write_t5, T5, "zy", "<extra_id_0>", "shared.weight",
            "playing <extra_id_0> player", [3, 4, 6, WORDS + 1, 3, 5, 1],
        ),
    ],
)  # fmt: skip
def test_a_union_is_one_for_transformers(
    name: str, write: Any, tokens: list[str], ordinary: str, special: str, table: str, text: str,
    due: list[int], tmp_path: Path,
) -> None:  # fmt: skip
    base, expert = pair(name, tmp_path, 2)
    write(base, filled(tokens))
    write(expert, filled(tokens, [ordinary]), [special])
    with pytest.raises(PlanError, match=rf"50 rows.*2 tokens that only .*{ordinary[-2:]}"):
        make_plan(recipe_of(expert, base))
    plan = make_plan(recipe_of(base, expert, tokenizer={"source": "union"}))
    run(plan, tmp_path / "out")
    assert any("ordinary tokens" in w for w in plan.warnings) == (name == "t5")
    made = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert made(text)["input_ids"] == due
    own = transformers.PreTrainedTokenizerFast.from_pretrained(expert)
    assert own(text)["input_ids"] == due
    assert made.decode(due) == own.decode(due)
    assert special not in made.decode(due, skip_special_tokens=True)
    loaded(name, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(expert / "model.safetensors")
    assert torch.equal(found[table][WORDS:], theirs[table][WORDS:])
    assert len(found[table]) == WORDS + 2


@pytest.mark.parametrize(
    ("name", "write", "tokens", "swapped"),
    [("bert", write_bert, BERT, "##ing"), ("t5", write_t5, T5, "ing")],
)
def test_a_swapped_piece_is_named(
    name: str, write: Any, tokens: list[str], swapped: str, tmp_path: Path
) -> None:
    base, expert = pair(name, tmp_path, 0)
    write(base, filled(tokens))
    at = tokens.index(swapped)
    others = filled(tokens)
    others[at], others[at + 1] = others[at + 1], others[at]
    write(expert, others)
    with pytest.raises(PlanError, match=rf"2 of its tokens .*'{swapped}'"):
        make_plan(recipe_of(base, expert))
    write(expert, filled(tokens))
    assert not make_plan(recipe_of(base, expert)).warnings


def test_pieces_of_a_sentencepiece_model_are_those_of_its_fast_form(tmp_path: Path) -> None:
    """T5's folders often hold `spiece.model` alone, whose pieces stand in a protocol buffer."""
    base, expert = pair("t5", tmp_path, 0)
    write_t5(base, filled(T5))
    for file in expert.glob("tokenizer*"):
        file.unlink()

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def model(tokens: Sequence[str]) -> bytes:
        score = bytes([2 << 3 | 5]) + b"\0\0\0\0"
        return b"".join(field(1, field(1, t.encode()) + score) for t in tokens)

    (expert / "spiece.model").write_bytes(model(filled(T5)))
    make_plan(recipe_of(base, expert))
    others = filled(T5)
    others[3], others[4] = others[4], others[3]
    (expert / "spiece.model").write_bytes(model(others))
    with pytest.raises(PlanError, match=r"2 of its tokens .*'▁play'"):
        make_plan(recipe_of(base, expert))
