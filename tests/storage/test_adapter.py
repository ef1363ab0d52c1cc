"""LoRA adapters against sums worked out by hand, and against one sentence for what is refused."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergewell.errors import CheckpointError
from mergewell.storage import adapter as adapters
from mergewell.storage.adapter import AdapterCheckpoint
from mergewell.storage.base import Checkpoint
from mergewell.storage.checkpoint import open_checkpoint

W = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])  # [O, I] = [2, 3]
A = torch.tensor([[1.0, 0.0, -1.0]])  # [r, I] = [1, 3]
B = torch.tensor([[2.0], [3.0]])  # [O, r] = [2, 1]
BA = [[2.0, 0.0, -2.0], [3.0, 0.0, -3.0]]
FACTORS = {"m.lora_A.weight": A, "m.lora_B.weight": B}


def save_base(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    tensors = {
        "m.weight": W.bfloat16(),
        "m.bias": torch.tensor([1.0, 2.0]),
        "head.weight": W.half(),
        "n": torch.tensor(4),
    }
    return save_base(tmp_path / "base", tensors, model_type="toy")


def test_an_expert_is_its_base_plus_scaled_b_a(base: Checkpoint, tmp_path: Path) -> None:
    expert = open_checkpoint(save_adapter(tmp_path / "a", FACTORS), base=base)
    assert isinstance(expert, AdapterCheckpoint)
    # alpha / r = 2: W + 2 B A
    assert expert["m.weight"].tolist() == [[5.0, 2.0, -1.0], [10.0, 5.0, 0.0]]
    assert expert.spec("m.weight").dtype == torch.float64
    assert expert.touched == ("m.weight",)
    for name in ("m.bias", "head.weight", "n"):
        assert expert.spec(name) == base.spec(name) and torch.equal(expert[name], base[name])
    assert list(expert) == list(base) and expert.shards == base.shards
    assert expert.config == {"model_type": "toy"} and expert.side_files == base.side_files
    assert [f.name for f in expert.files] == ["adapter_model.safetensors", "adapter_config.json"]
    assert torch.equal(pickle.loads(pickle.dumps(expert))["m.weight"], expert["m.weight"])
    same = open_checkpoint(tmp_path / "a" / "adapter_model.safetensors", base=base)
    assert torch.equal(same["m.weight"], expert["m.weight"])


def test_a_change_below_the_base_s_precision_is_not_lost(base: Checkpoint, tmp_path: Path) -> None:
    small = {"m.lora_A.weight": A * 2.0**-20, "m.lora_B.weight": B}
    expert = open_checkpoint(save_adapter(tmp_path / "a", small), base=base)
    delta = expert["m.weight"] - base["m.weight"].double()
    assert (delta * 2.0**19).tolist() == BA  # bfloat16 has 8 bits, and 1 + 2^-18 would be 1


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"lora_alpha": 4}, 4.0),
        ({"use_rslora": True, "r": 4, "lora_alpha": 4}, 2.0),
        ({"r": 4, "lora_alpha": 4}, 1.0),
        ({"r": 8, "rank_pattern": {"m": 4}, "alpha_pattern": {"m": 8}}, 2.0),
        ({"r": 4, "alpha_pattern": {"other": 8, "x.m": 1, "^m": 12, "m": 3}}, 3.0),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"m.": 8}}, 0.5),
    ],
)
def test_scaling(base: Checkpoint, tmp_path: Path, config: dict[str, Any], factor: float) -> None:
    rank = config.get("rank_pattern", {}).get("m", config.get("r", 1))
    factors = {"m.lora_A.weight": A.repeat(rank, 1), "m.lora_B.weight": B.repeat(1, rank) / rank}
    expert = open_checkpoint(save_adapter(tmp_path / "a", factors, **config), base=base)
    delta = expert["m.weight"] - base["m.weight"]
    assert (delta / factor).tolist() == BA


def test_fan_in_fan_out_and_embeddings_are_turned(base: Checkpoint, tmp_path: Path) -> None:
    # GPT-2 stores [I, O]: the factors are those of a layer from 2 inputs to 3 outputs
    turned = {"m.lora_A.weight": B.T, "m.lora_B.weight": A.T}
    expert = open_checkpoint(save_adapter(tmp_path / "a", turned, fan_in_fan_out=True), base=base)
    assert (expert["m.weight"] - W).tolist() == [[4.0, 0.0, -4.0], [6.0, 0.0, -6.0]]
    looked_up = {"m.lora_embedding_A": B.T, "m.lora_embedding_B": A.T}
    embedding = open_checkpoint(save_adapter(tmp_path / "b", looked_up), base=base)
    assert torch.equal(embedding["m.weight"], expert["m.weight"])


def test_convolutions(tmp_path: Path) -> None:
    weight = torch.zeros(2, 3, 1, 2)
    base = save_base(tmp_path / "base", {"m.weight": weight})
    a = torch.arange(6.0).view(1, 3, 1, 2)
    factors = {"m.lora_A.weight": a, "m.lora_B.weight": torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)}
    expert = open_checkpoint(save_adapter(tmp_path / "a", factors), base=base)
    assert torch.equal(expert["m.weight"], torch.stack([2 * a[0], 20 * a[0]]).double())


def test_biases_and_whole_tensors(base: Checkpoint, tmp_path: Path) -> None:
    more = {
        "m.lora_B.bias": torch.tensor([1.0, -1.0]),
        "head.weight": W + 1,
        "score.weight": W,
    }
    expert = open_checkpoint(
        save_adapter(tmp_path / "a", {**FACTORS, **more}, lora_bias=True), base=base
    )
    assert expert["m.bias"].tolist() == [3.0, 0.0]  # scaled by 2
    assert torch.equal(expert["head.weight"], W + 1)
    assert expert.spec("head.weight").dtype == torch.float32
    assert torch.equal(expert["score.weight"], W) and "score.weight" not in base
    assert expert.shards[-1].names == ("score.weight",)
    over = {**FACTORS, "m.base_layer.weight": W * 0, "m.base_layer.bias": torch.ones(2)}
    replaced = open_checkpoint(save_adapter(tmp_path / "b", over, bias="all"), base=base)
    assert (replaced["m.weight"] / 2).tolist() == BA
    assert replaced["m.bias"].tolist() == [1.0, 1.0]


def test_dora_gives_rows_their_norms(base: Checkpoint, tmp_path: Path) -> None:
    # rows of W + 2 B A: (5, 2, -1) and (10, 5, 0), of squared lengths 30 and 125
    magnitude = {"m.lora_magnitude_vector": torch.tensor([30.0**0.5, 2 * 125.0**0.5])}
    expert = open_checkpoint(
        save_adapter(tmp_path / "a", {**FACTORS, **magnitude}, use_dora=True), base=base
    )
    due = torch.tensor([[5.0, 2.0, -1.0], [20.0, 10.0, 0.0]]).double()
    assert torch.allclose(expert["m.weight"], due, rtol=1e-6)


@pytest.mark.parametrize(
    ("stored", "module"),
    [("h.0.m.weight", "transformer.h.0.m"), ("bert.h.0.m.weight", "h.0.m")],
)
def test_names_may_carry_or_lack_a_prefix(tmp_path: Path, stored: str, module: str) -> None:
    base = save_base(tmp_path / "base", {stored: W, "other.weight": W + 1})
    factors = {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    expert = open_checkpoint(save_adapter(tmp_path / "a", factors), base=base)
    assert ((expert[stored] - W) / 2).tolist() == BA


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    rank=st.integers(1, 5),
    turned=st.booleans(),
    dora=st.booleans(),
    tile=st.sampled_from([1, 7, 20, 1000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_blocks_join_to_the_whole_bit_for_bit(
    shape: list[int],
    rank: int,
    turned: bool,
    dora: bool,
    tile: int,
    dtype: torch.dtype,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    turned, dora = turned and len(shape) == 2, dora and len(shape) == 2 and not turned
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    folder = tmp_path_factory.mktemp("blocks")
    weight = torch.randn(shape, generator=generator).to(dtype)
    base = save_base(folder / "base", {"m.weight": weight})
    inner = (rank, *((shape[0],) if turned else shape[1:]))
    outer = (shape[1] if turned else shape[0], rank, *[1] * (len(shape) - 2))
    a, b = (torch.randn(size, generator=generator).to(dtype) for size in (inner, outer))
    factors = {"m.lora_A.weight": a, "m.lora_B.weight": b}
    lengths = torch.rand(shape[0], generator=generator)
    if dora:
        factors["m.lora_magnitude_vector"] = lengths
    path = save_adapter(
        folder / "a", factors, r=rank, lora_alpha=3, fan_in_fan_out=turned, use_dora=dora
    )
    expert = open_checkpoint(path, base=base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "_TILE", tile)
        cuts = sorted(data.draw(st.sets(st.integers(0, weight.numel()))) | {0, weight.numel()})
        blocks = [expert.read("m.weight", start, stop) for start, stop in pairwise(cuts)]
        assert torch.equal(torch.cat(blocks), expert.read("m.weight"))
        assert expert.read("m.weight", 0, 0).dtype == torch.float64
    product = (b.double().flatten(1) @ a.double().flatten(1)) * 3 / rank
    due = weight.double() + (product.T if turned else product).reshape(shape)
    if dora:
        due = due * (lengths.double() / due.norm(dim=1))[:, None]
    assert torch.allclose(expert["m.weight"], due, rtol=1e-12, atol=1e-12)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another kind": ({"peft_type": "LOHA"}, {}, "adapters of kind 'LOHA' are not supported"),
    "kind missing": ({"peft_type": None}, {}, "adapters of kind None"),
    "rows of an embedding": (
        {"trainable_token_indices": [1]}, {}, "trainable_token_indices is not supported, since it",
    ),
    "bare parameters": ({"target_parameters": ["e"]}, {}, "target_parameters is not supported"),
    "activated": ({"alora_invocation_tokens": [1]}, {}, "alora_invocation_tokens is not"),
    "not known": ({"sub_lora": 3}, {}, "sub_lora is not supported, since what it does"),
    "an initialisation": ({"init_lora_weights": "pissa_niter_4"}, {}, "'pissa_niter_4' is not"),
    "no rank": ({"r": None}, {}, "r = None is no positive number"),
    "a rank of another": ({"r": 4}, {}, "gives m the rank 4, but its factors have 1"),
    "a pattern": ({"alpha_pattern": {"(": 1}}, {}, r"alpha_pattern has '\(', which is no pattern"),
    "a list for a pattern": ({"rank_pattern": [1]}, {}, "rank_pattern is no mapping"),
    "half a pair": ({}, {"m.lora_B.weight": None}, "m lacks its lora_B.weight"),
    "an empty factor": ({}, {"m.lora_A.weight": torch.empty(0)}, "which cannot be multiplied"),
    "another shape": ({}, {"m.lora_B.weight": torch.ones(5, 1)}, r"shape \[5, 3\].*\[2, 3\]"),
    "turned": ({"fan_in_fan_out": True}, {}, r"shape \[3, 2\] \(fan_in_fan_out: True\)"),
    "another module": (
        {}, {"k.lora_A.weight": A, "k.lora_B.weight": B}, "has no tensor 'k.weight'",
    ),
    "integers": (
        {},
        {"n.lora_A.weight": A[:, :1], "n.lora_B.weight": B[:1], "m.lora_A.weight": None,
         "m.lora_B.weight": None},
        "has no tensor 'n.weight'",
    ),
    "another key": ({}, {"m.lora_diag": torch.ones(1)}, "m.lora_diag' does to the base is not"),
    "token rows": (
        {}, {"e.token_adapter.trainable_tokens_delta": W}, "trainable_tokens_delta' does to",
    ),
    "dora without norms": ({"use_dora": True}, {}, "but m has no lora_magnitude_vector"),
    "norms without dora": (
        {}, {"m.lora_magnitude_vector": torch.ones(2)}, "but m has a lora_magnitude_vector",
    ),
    "turned dora": (
        {"use_dora": True},
        {"m.lora_embedding_A": B.T, "m.lora_embedding_B": A.T, "m.lora_A.weight": None,
         "m.lora_B.weight": None, "m.lora_magnitude_vector": torch.ones(2)},
        r"DoRA \(use_dora\) of m is not supported",
    ),
    "a bias that is not there": (
        {"lora_bias": True}, {"m.lora_B.bias": torch.ones(5)}, r"\(lora_bias\) is added to m.bias",
    ),
    "a head of another size": ({}, {"head.weight": torch.ones(7, 3)}, r"has shape \[7, 3\] but"),
    "no factor": (
        {}, {"m.lora_A.weight": None, "m.lora_B.weight": None, "head.weight": W}, "is a LoRA fac"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_in_a_sentence(
    base: Checkpoint, tmp_path: Path, name: str
) -> None:
    config, tensors, sentence = REFUSED[name]
    held = {n: t for n, t in {**FACTORS, **tensors}.items() if t is not None}
    path = save_adapter(tmp_path / "a", held, **config)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        open_checkpoint(path, base=base)
    text = str(caught.value)
    assert str(tmp_path) in text and text.endswith(".") and len(text) < 500


def test_an_adapter_needs_its_base(tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "a", FACTORS, base_model_name_or_path="org/base")
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter; name the base .*\(org/base\)"):
        open_checkpoint(path)


def test_folders_that_are_two_things_or_none(base: Checkpoint, tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "a", FACTORS)
    save_file({"w": W}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has both adapter_config.json and model.safe"):
        open_checkpoint(path, base=base)
    open_checkpoint(path / "adapter_model.safetensors", base=base)
    (path / "model.safetensors").unlink()
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"but none of adapter_model.safetensors"):
        open_checkpoint(path, base=base)


def test_weights_in_pytorch_s_format(base: Checkpoint, tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "a", FACTORS)
    (path / "adapter_model.safetensors").unlink()
    torch.save({f"base_model.model.{n}": t for n, t in FACTORS.items()}, path / "adapter_model.bin")
    expert = open_checkpoint(path, base=base)
    assert ((expert["m.weight"] - W) / 2).tolist() == BA


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, True),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, False),
        ({"architectures": ["LayoutLMModel"], "tie_word_embeddings": True}, False),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": True, "model_type": "toy", "vocab_size": 9}, False),
    ],
)
def test_tied_embeddings_are_not_changed(
    tmp_path: Path, config: dict[str, Any], refused: bool
) -> None:
    base = save_base(tmp_path / "base", {"m.weight": W}, **{"vocab_size": 2, **config})
    path = save_adapter(tmp_path / "a", {"m.lora_embedding_A": B.T, "m.lora_embedding_B": A.T})
    if not refused:
        assert ((open_checkpoint(path, base=base)["m.weight"] - W) / 2).tolist() == BA
        return
    with pytest.raises(CheckpointError, match="uses both as embedding and as output layer"):
        open_checkpoint(path, base=base)


def test_names_that_could_be_two_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {"x.m.weight": W, "y.m.weight": W + 1})
    with pytest.raises(CheckpointError, match=r"could be any of x\.m\.weight, y\.m\.weight"):
        open_checkpoint(save_adapter(tmp_path / "a", FACTORS), base=base)
