"""Mixtures and pipelines on the command line: noticed, planned, made, verified; or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("transformers")
from language_toys import family, loaded
from test_pipeline import UNET, pipeline

from mergewell.cli.main import main
from mergewell.mixture.choice import read_mixture

MOE = """
base_model: base
gate_mode: random
experts:
  - source_model: expert0
    positive_prompts: [ab, cd]
  - source_model: expert1
"""


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    family("llama", tmp_path)
    (tmp_path / "moe.yaml").write_text(MOE)
    return tmp_path / "moe.yaml"


def test_a_mixture_is_noticed(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = moe.parent / "out"
    assert main(["plan", str(moe)]) == 0
    told = capsys.readouterr().out
    assert "MixtralForCausalLM: 2 layers of 2 experts" in told
    assert "experts.1.w2.weight" in told
    assert main(["plan", str(moe), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(["merge", str(moe), "--out", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["tensors"] == len(planned["tensors"])
    state = load_file(out / "model.safetensors")
    assert {row["name"]: row["shape"] for row in planned["tensors"]} == {
        name: [*tensor.shape] for name, tensor in state.items()
    }
    assert planned["write_bytes"] == sum(tensor.nbytes for tensor in state.values())
    loaded("mixtral", out)
    assert main(["verify", str(out)]) == 0
    assert main(["verify", str(out), "--deep"]) == 0
    assert "not merged by a recipe" in capsys.readouterr().out
    assert main(["doctor", str(out)]) == 0
    again = moe.parent / "again"
    assert main(["merge", str(out / "manifest.json"), "--out", str(again), "--json"]) == 0
    hashes = [json.loads((f / "manifest.json").read_text())["outputs"] for f in (out, again)]
    assert hashes[0] == hashes[1]


def test_a_mixture_in_our_own_words(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(moe), "--print-recipe"]) == 0
    ours = moe.parent / "ours.yaml"
    ours.write_text(capsys.readouterr().out)
    assert "prompts:" in ours.read_text()
    assert "positive_prompts" not in ours.read_text()
    assert read_mixture(ours) == read_mixture(moe)


@pytest.mark.parametrize(
    ("text", "flags", "sentence"),
    [
        (MOE, ["--shard", "0/2"], "--shard: a mixture of experts is copied"),
        (MOE, ["--method", "ties"], "--method: a mixture"),
        (MOE, ["--hash", "md5"], "--hash md5"),
        (MOE.replace("expert1", "nowhere"), [], "nowhere does not exist"),
        (MOE.replace("random", "hidden"), [], "gate hidden needs prompts, expert 2 has none"),
        (MOE + "shared_experts: [{source_model: base}]", [], "shared_experts: MixtralForCausalLM"),
        (MOE.replace("gate_mode", "gait_mode"), [], "no parameter 'gait_mode'"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_in_a_sentence(
    text: str, flags: list[str], sentence: str, moe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe.write_text(text)
    assert main(["merge", str(moe), "--out", str(moe.parent / "out"), *flags]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
    assert not (moe.parent / "out").exists()


def test_other_commands_say_that_a_mixture_is_no_merge(
    moe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(moe)]) == 2
    assert "assembled and not merged" in capsys.readouterr().err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    values = [("base", 0, 0), ("one", 1, 4), ("two", 3, 8)]
    for name, unet, encoder in values:
        pipeline(tmp_path / name, unet, encoder)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "{base: base, experts: [{path: one}, {path: two}], "
        "method: {name: task_arithmetic, scale: 1}}"
    )
    return path


def test_a_pipeline_is_merged_whole(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = recipe.parent / "out"
    assert main(["plan", str(recipe)]) == 0
    told = capsys.readouterr().out
    assert told.index("# unet") < told.index("# text_encoder")
    assert "copied as they are: vae, scheduler, tokenizer" in told
    assert main(["plan", str(recipe), "--json"]) == 0
    assert [*json.loads(capsys.readouterr().out)["components"]] == ["unet", "text_encoder"]
    assert main(["merge", str(recipe), "--out", str(out), "--hash", "sha256"]) == 0
    told = capsys.readouterr().out
    assert "unet: 2 tensors, 2 changed" in told
    manifest = json.loads((out / "unet" / "manifest.json").read_text())
    assert manifest["outputs"][0]["hash"].startswith("sha256:")
    assert load_file(out / "unet" / UNET)["down.weight"].unique().tolist() == [4]
    assert main(["verify", str(out), "--deep"]) == 0
    told = capsys.readouterr().out
    assert "copied and have no manifest: vae, scheduler, tokenizer" in told
    assert main(["doctor", str(recipe)]) == 0
    assert main(["doctor", str(out), "--json"]) == 0
    visits = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert [*visits["components"]] == ["unet", "text_encoder"]
    file = out / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert main(["verify", str(out)]) == 2
    assert "text_encoder:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "flags", "sentence"),
    [
        (("two", "two"), ["--resume"], "--resume: a pipeline is merged component by component"),
        (("two", "two/unet"), [], "model_index.json"),
        (("average", "average"), ["--card"], "--card: a pipeline"),
    ],
)
def test_what_is_not_of_pipelines_is_refused(
    change: tuple[str, str],
    flags: list[str],
    sentence: str,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe.write_text(recipe.read_text().replace(f"path: {change[0]}", f"path: {change[1]}"))
    assert main(["merge", str(recipe), "--out", str(recipe.parent / "out"), *flags]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
    assert not (recipe.parent / "out").exists()
