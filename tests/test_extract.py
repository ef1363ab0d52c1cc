"""What an expert adds to its base as an adapter: sizes and errors by hand, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from safetensors.torch import load_file, save_file

from mergewell import extract
from mergewell.errors import CheckpointError, OutputError, PlanError, RecipeError, UserError
from mergewell.extract import Size, extract_adapter
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import read_manifest, verify_files

LAYERS = ("model.layers.0.up", "model.layers.1.up")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model() -> dict[str, torch.Tensor]:
    return {
        **{f"{layer}.weight": drawn(6, 4, seed=i) for i, layer in enumerate(LAYERS)},
        **{f"{layer}.bias": drawn(6, seed=i) for i, layer in enumerate(LAYERS)},
        "model.conv.weight": drawn(5, 3, 2, 2),
        "model.embed_tokens.weight": drawn(9, 4),
        "model.norm.weight": drawn(4),
    }


def test_worked_example(tmp_path: Path) -> None:
    # the change has the singular values 4, 3 and 0: of its squared norm, 25, rank 1 keeps 16
    change = torch.zeros(6, 4)
    change[0, 1], change[2, 3] = 4.0, -3.0
    base = model()
    name = "model.layers.0.up.weight"
    expert = {**base, name: base[name] * 0 + change}
    save(tmp_path / "base", {**base, name: base[name] * 0})
    save(tmp_path / "expert", expert)
    for size, rank, error in (
        (Size(rank=1), 1, 0.6),
        (Size(rank=3), 2, 0.0),
        (Size(energy=0.64), 1, 0.6),
        (Size(energy=0.65), 2, 0.0),
        (Size(rank=1, energy=0.9), 1, 0.6),
        (Size(rank=3, energy=0.5), 1, 0.6),
    ):
        out = tmp_path / f"{size.rank}-{size.energy}"
        manifest = extract_adapter(tmp_path / "base", tmp_path / "expert", out, size=size)
        done = manifest.model_dump()["extract"]
        assert done["tensors"][name]["rank"] == rank
        assert done["tensors"][name]["error"] == pytest.approx(error, abs=1e-6)
        assert done["error"] == done["tensors"][name]["error"]
        factors = load_file(out / "adapter_model.safetensors")
        b = factors[f"base_model.model.{name[:-7]}.lora_B.weight"]
        a = factors[f"base_model.model.{name[:-7]}.lora_A.weight"]
        kept = change.clone()
        kept[2, 3] = kept[2, 3] if rank > 1 else 0.0
        assert torch.allclose(b @ a, kept, atol=1e-6)
        assert b.norm() == pytest.approx(float(a.norm()), rel=1e-5)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == [name[:-7]]  # `up` would be a module that did not change
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert verify_files(out) == []
    read = read_manifest(out)
    assert [Path(f.path).parent.name for f in read.inputs] == ["base", "expert"]


def test_everything_that_changed_comes_back(tmp_path: Path) -> None:
    base, moved = model(), {name: t + 0.1 * drawn(*t.shape, seed=9) for name, t in model().items()}
    moved["score.weight"] = drawn(2, 4)
    save(tmp_path / "base", base)
    save(tmp_path / "expert", moved)
    done = extract_adapter(
        tmp_path / "base", tmp_path / "expert", tmp_path / "a", size=Size(energy=1.0)
    ).model_dump()["extract"]
    assert set(done["tensors"]) == {n for n in base if n.endswith("weight") and "norm" not in n}
    assert set(done["whole"]) == set(moved) - set(done["tensors"]) and done["left_out"] == []
    assert done["error"] < 1e-6
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["conv", "embed_tokens", "up"]
    assert config["modules_to_save"] == ["model.norm", "score"] and config["bias"] == "lora_only"
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.conv": 5}
    first = open_checkpoint(tmp_path / "base")
    read = open_checkpoint(tmp_path / "a", base=first)
    assert set(read) == set(moved)
    for name, tensor in moved.items():
        assert torch.allclose(read[name].float(), tensor, atol=1e-6), name


def test_an_adapter_comes_back_as_itself(tmp_path: Path) -> None:
    name = "model.layers.0.up"
    save(tmp_path / "base", {n: t.bfloat16() for n, t in model().items()})
    factors = {f"{name}.lora_A.weight": drawn(2, 4) / 100, f"{name}.lora_B.weight": drawn(6, 2)}
    path = save_adapter(tmp_path / "a", factors, r=2, lora_alpha=3)
    manifest = extract_adapter(tmp_path / "base", path, tmp_path / "b", size=Size(rank=4))
    done = manifest.model_dump()["extract"]
    assert list(done["tensors"]) == [f"{name}.weight"]
    assert done["tensors"][f"{name}.weight"]["rank"] == 2 and done["error"] < 1e-6
    base = open_checkpoint(tmp_path / "base")
    first, second = (open_checkpoint(tmp_path / f, base=base)[f"{name}.weight"] for f in "ab")
    assert torch.allclose(first, second, atol=1e-8, rtol=0)
    with pytest.raises(OutputError, match="exists already"):
        extract_adapter(tmp_path / "base", path, tmp_path / "b", size=Size(rank=4))


def test_gpt2_s_matrices_are_turned(tmp_path: Path) -> None:
    base = {
        "h.0.c_attn.weight": drawn(4, 12),
        "h.0.ln.weight": drawn(4),
        "score.weight": drawn(2, 4),
    }
    moved = {name: t + drawn(*t.shape, seed=5) for name, t in base.items()}
    save(tmp_path / "base", base, model_type="gpt2")
    save(tmp_path / "expert", moved, model_type="gpt2")
    extract_adapter(tmp_path / "base", tmp_path / "expert", tmp_path / "a", size=Size(rank=4))
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert factors["base_model.model.h.0.c_attn.lora_A.weight"].shape == (4, 4)
    assert factors["base_model.model.h.0.c_attn.lora_B.weight"].shape == (12, 4)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["fan_in_fan_out"]
    read = open_checkpoint(tmp_path / "a", base=open_checkpoint(tmp_path / "base"))
    for name, tensor in moved.items():
        assert torch.allclose(read[name].float(), tensor, atol=1e-6), name


def test_patterns_keep_whole_or_leave_out(tmp_path: Path) -> None:
    base, moved = model(), {name: t + 0.1 * drawn(*t.shape, seed=9) for name, t in model().items()}
    save(tmp_path / "base", base)
    save(tmp_path / "expert", moved)
    done = extract_adapter(
        tmp_path / "base",
        tmp_path / "expert",
        tmp_path / "a",
        size=Size(rank=4),
        whole=["model.conv.*"],
        leave_out=["*.bias", "model.norm.*"],
    ).model_dump()["extract"]
    assert done["whole"] == ["model.conv.weight"]
    assert set(done["left_out"]) == {n for n in base if n.endswith("bias")} | {"model.norm.weight"}
    changes = {name: (moved[name] - base[name]).double() for name in base}
    lost = sum(float(changes[name].square().sum()) for name in done["left_out"])
    whole = sum(float(change.square().sum()) for change in changes.values())
    assert done["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    read = open_checkpoint(tmp_path / "a", base=open_checkpoint(tmp_path / "base"))
    assert torch.equal(read["model.norm.weight"], base["model.norm.weight"])


def test_half_precision_is_counted_in_the_error(tmp_path: Path) -> None:
    base = {"m.weight": torch.zeros(30, 20)}
    save(tmp_path / "base", base)
    save(tmp_path / "expert", {"m.weight": drawn(30, 2) @ drawn(2, 20)})
    errors = [
        extract_adapter(
            tmp_path / "base", tmp_path / "expert", tmp_path / dtype, size=Size(rank=2), dtype=dtype
        ).model_dump()["extract"]["error"]
        for dtype in ("float32", "float16", "bfloat16")
    ]
    assert errors[0] < 1e-6 < 1e-5 < errors[1] < 1e-3 < errors[2] < 1e-2
    save(tmp_path / "large", {"m.weight": 1e12 * torch.ones(30, 20)})
    with pytest.raises(PlanError, match=r"m.weight: the factors overflow torch\.float16"):
        extract_adapter(
            tmp_path / "base", tmp_path / "large", tmp_path / "x", size=Size(rank=2),
            dtype="float16",
        )  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_large_matrices_are_sketched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "_EXACT", 20)
    save(tmp_path / "base", {"m.weight": torch.zeros(60, 50)})
    spectrum = torch.linalg.qr(drawn(60, 50)).Q * 2.0 ** -torch.arange(50)
    save(tmp_path / "expert", {"m.weight": spectrum @ torch.linalg.qr(drawn(50, 50, seed=3)).Q})
    done = extract_adapter(
        tmp_path / "base", tmp_path / "expert", tmp_path / "a", size=Size(rank=3)
    ).model_dump()["extract"]
    assert done["error"] == pytest.approx(2.0**-3, rel=1e-4)  # the best there is


REFUSED: dict[str, tuple[dict[str, Any], type[UserError], str]] = {
    "nothing changed": ({}, PlanError, "there is nothing to extract"),
    "another shape": ({"model.norm.weight": drawn(5)}, CheckpointError, r"has shape \[5\]"),
    "missing": ({"model.norm.weight": None}, CheckpointError, "lacks 'model.norm.weight'"),
    "no matrix": ({"model.norm.weight": drawn(4, seed=3)}, PlanError, "changed in no matrix"),
    "no module": ({"logit_scale": drawn(1)}, PlanError, "logit_scale changed, but belongs to no"),
    "not finite": (
        {"model.layers.0.up.weight": torch.full((6, 4), torch.nan)}, CheckpointError, "holds NaN",
    ),
    "beside a matrix": (
        {"model.layers.0.up.weight": drawn(6, 4, seed=8), "model.layers.0.up.g": drawn(1)},
        PlanError, r"--whole 'model.layers.0.up.\*'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_extracted_is_refused(tmp_path: Path, name: str) -> None:
    change, kind, sentence = REFUSED[name]
    moved = {n: t for n, t in {**model(), **change}.items() if t is not None}
    save(tmp_path / "base", model())
    save(tmp_path / "expert", moved)
    with pytest.raises(kind, match=sentence):
        extract_adapter(tmp_path / "base", tmp_path / "expert", tmp_path / "a", size=Size(rank=2))
    assert not (tmp_path / "a").exists()


def test_patterns_and_sizes_that_mean_nothing(tmp_path: Path) -> None:
    save(tmp_path / "base", model())
    save(tmp_path / "expert", {**model(), "model.layers.0.up.weight": drawn(6, 4, seed=8)})
    given = (tmp_path / "base", tmp_path / "expert", tmp_path / "a")
    with pytest.raises(RecipeError, match=r"'model.norm.\*' matches no tensor that changed"):
        extract_adapter(*given, size=Size(rank=2), leave_out=["model.norm.*"])
    with pytest.raises(PlanError, match="Every tensor that changed is left out"):
        extract_adapter(*given, size=Size(rank=2), leave_out=["*"])
    with pytest.raises(RecipeError, match="No size is named"):
        Size()
    with pytest.raises(RecipeError, match="a rank of 1 at least"):
        Size(rank=0)
    with pytest.raises(RecipeError, match="above 0 and up to 1"):
        Size(energy=1.5)


def test_tied_embeddings_are_refused(tmp_path: Path) -> None:
    config = {"vocab_size": 9, "architectures": ["ToyForCausalLM"], "tie_word_embeddings": True}
    save(tmp_path / "base", model(), **config)
    moved = {n: t + 1 for n, t in model().items()}
    save(tmp_path / "expert", moved, **config)
    given = (tmp_path / "base", tmp_path / "expert", tmp_path / "a")
    with pytest.raises(PlanError, match=r"--leave-out model\.embed_tokens\.weight"):
        extract_adapter(*given, size=Size(rank=2))
    extract_adapter(*given, size=Size(rank=2), leave_out=["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (("a.q", "b.q"), ["q"]),
        (("a.q",), ["a.q"]),  # b.q did not change
        (("x.0",), ["x.0"]),  # a number
        (("y.z",), ["y.z"]),  # z.k is in a module that is called z
    ],
)
def test_targets_mean_no_other_module(
    tmp_path: Path, names: tuple[str, ...], targets: list[str]
) -> None:
    base = {f"{n}.weight": drawn(6, 4) for n in ("a.q", "b.q", "x.0", "y.z", "z.k")}
    moved = {**base, **{f"{n}.weight": drawn(6, 4, seed=1) for n in names}}
    save(tmp_path / "base", base)
    save(tmp_path / "expert", moved)
    extract_adapter(tmp_path / "base", tmp_path / "expert", tmp_path / "a", size=Size(rank=4))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == targets


def test_modules_whose_names_end_alike_are_kept_together(tmp_path: Path) -> None:
    # PEFT looks for `norm` at the end of all names, and so finds `x.prenorm` too
    base = {"norm.weight": drawn(4), "x.prenorm.weight": drawn(4), "up.weight": drawn(6, 4)}
    moved = {**base, "norm.weight": drawn(4, seed=1), "up.weight": drawn(6, 4, seed=1)}
    save(tmp_path / "base", base)
    save(tmp_path / "expert", moved)
    done = extract_adapter(
        tmp_path / "base", tmp_path / "expert", tmp_path / "a", size=Size(rank=4)
    ).model_dump()["extract"]
    assert done["whole"] == ["norm.weight", "x.prenorm.weight"]
