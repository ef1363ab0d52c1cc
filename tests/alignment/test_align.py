"""Aligned folders: the same function in the order of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from permutable import ResNet, mlp, shaken
from safetensors.torch import save_file
from torch import Tensor, nn

from mergewell.alignment.align import align_folder, aligned
from mergewell.alignment.tracing import permutation_graph
from mergewell.cli.main import main
from mergewell.errors import DataError, ModelError, OutputError
from mergewell.models.loader import ModuleSource, load_state
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import read_manifest

pytest.importorskip("scipy")
SOURCE = ModuleSource.parse("permutable:ResNet")


def write(folder: Path, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    stored = {
        name: tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A residual network, a permuted copy of it in bfloat16, and inputs."""
    module = shaken(ResNet()).float()
    state = {name: t.bfloat16().float() for name, t in module.state_dict().items()}
    graph = permutation_graph(module, torch.rand(2, 3, 8, 8))
    data = tmp_path / "data.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"x": torch.randn(64, 3, 8, 8, generator=generator)}, data)
    whole = {name: t.long() if "tracked" in name else t for name, t in state.items()}
    moved = graph.permuted(whole, graph.random(seed=1))
    return write(tmp_path / "a", whole), write(tmp_path / "b", moved, torch.bfloat16), data


@pytest.mark.parametrize("match", ["weights", "activations"])
def test_a_permuted_copy_comes_back_bitwise(
    pair: tuple[Path, Path, Path], tmp_path: Path, match: Any
) -> None:
    to, expert, data = pair
    out = tmp_path / "out"
    manifest = align_folder(expert, to, out, source=SOURCE, data=str(data), match=match)
    told = manifest.model_dump()["align"]
    assert told["distance_before"] > 10 and told["distance_after"] == 0
    assert 0.5 < told["moved"] <= 1 and told["units"] == 8 + 8 + 12 + 12 + 12
    assert 0 < told["output_change"] < 1e-5 and told["samples"] == 64
    assert told["fixed"]["fc.weight:0"] == "is the model's output"
    reference, aligned_to = open_checkpoint(to), open_checkpoint(out)
    assert list(aligned_to) == list(open_checkpoint(expert))
    for name in reference:
        assert torch.equal(aligned_to[name].to(reference[name].dtype), reference[name]), name
    assert aligned_to.spec("stem.weight").dtype == torch.bfloat16
    assert (out / "config.json").read_text() == "{}"
    assert manifest.tensors_changed > 20 and len(manifest.inputs) == 3
    assert main(["verify", str(out)]) == 0


def test_aligned_to_itself_is_the_same_file(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    to, _, data = pair
    manifest = align_folder(to, to, tmp_path / "out", source=SOURCE, data=str(data))
    told = manifest.model_dump()["align"]
    assert (told["moved"], told["output_change"], manifest.tensors_changed) == (0, 0, 0)
    before, after = open_checkpoint(to), open_checkpoint(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_aligned_model_computes_the_same() -> None:
    one, two = shaken(mlp(), seed=1), shaken(mlp(), seed=2)
    batch = torch.rand(8, 4, dtype=torch.float64)
    before = two(batch)
    done = aligned(one, two, [batch])
    assert done.distances[1] < done.distances[0]
    torch.testing.assert_close(two(batch), before, rtol=0, atol=1e-14)


def test_a_hugging_face_folder_brings_its_own_inputs_and_keeps_tied_weights(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16
    )  # fmt: skip
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    manifest = align_folder(
        tmp_path / "b", tmp_path / "a", out, source=ModuleSource.parse(tmp_path / "b")
    )
    told = manifest.model_dump()["align"]
    assert told["distance_after"] < told["distance_before"] and told["samples"] == 0
    assert told["output_change"] < 1e-5
    one, two = (ModuleSource.parse(tmp_path / "b").build() for _ in range(2))
    load_state(one, open_checkpoint(tmp_path / "b"))
    load_state(two, open_checkpoint(out))
    ids = {"input_ids": torch.arange(10)[None]}
    torch.testing.assert_close(one(**ids).logits, two(**ids).logits, rtol=1e-4, atol=1e-5)


class Sorting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).sort(-1).values


def test_mistakes_are_named_and_leave_nothing(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    to, expert, data = pair
    out = tmp_path / "out"
    with pytest.raises(DataError, match="add --data"):
        align_folder(expert, to, out, source=SOURCE)
    with pytest.raises(ModelError, match="does not fit"):
        align_folder(expert, to, out, source=ModuleSource.parse("permutable:mlp"), data=str(data))
    with pytest.raises(ModelError, match=r"no units that can be permuted.*sort"):
        aligned(Sorting().eval(), Sorting().eval(), [torch.rand(2, 3)])
    assert not out.exists()
    with pytest.raises(OutputError, match="exists"):
        align_folder(expert, to, to, source=SOURCE, data=str(data))


def test_a_wrong_graph_is_caught_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If a rule were wrong the outputs would change, and the expert is refused."""
    from mergewell.alignment.permutations import PermutationGraph

    def half(self: PermutationGraph, name: str, tensor: Tensor, by: Any) -> Tensor:
        return tensor.flip(0) if name == "0.weight" else tensor

    monkeypatch.setattr(PermutationGraph, "permuted_tensor", half)
    with pytest.raises(ModelError, match="computes something else"):
        aligned(shaken(mlp()), shaken(mlp(), seed=3), [torch.rand(2, 4, dtype=torch.float64)])


def test_the_command(
    pair: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to, expert, data = map(str, pair)
    out = str(tmp_path / "out")
    given = ["align", expert, "--data", data, "--model-factory", "permutable:ResNet"]
    assert main([*given, "--to", to, "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "of 52 units in 5 groups moved" in printed and "(100\xa0% nearer)" in printed
    assert "dimension: is the model's input" in printed
    assert read_manifest(Path(out)).tensors_changed > 20
    assert main([*given, "--to", to, "--out", f"{out}2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["version"] == 1 and told["distance_after"] == 0
    for wrong, says in (
        (["--to", to], "--out DIR"),
        (["--out", f"{out}3"], "--to PATH"),
        (["--to", to, "--out", f"{out}3", "--match", "weight"], "did you mean 'weights'"),
    ):
        assert main([*given, *wrong]) == 2
        assert says in capsys.readouterr().err
    plain = ["align", expert, "--to", to, "--match", "activations", "--out", f"{out}3"]
    assert main(plain) == 2 and "--data PATH" in capsys.readouterr().err


def test_an_aligned_expert_is_merged_and_repaired(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    to, _, data = pair
    other = {name: tensor.float() for name, tensor in shaken(ResNet(), seed=5).state_dict().items()}
    counted = {name: t.long() if "tracked" in name else t for name, t in other.items()}
    expert, out = write(tmp_path / "c", counted), tmp_path / "out"
    align_folder(expert, to, out, source=SOURCE, data=str(data))
    merged, mended = str(tmp_path / "merged"), str(tmp_path / "mended")
    assert main(["merge", "--expert", str(to), "--expert", str(out), "--out", merged]) == 0
    one, two, mean = (open_checkpoint(path) for path in (to, out, merged))
    torch.testing.assert_close(mean["fc.weight"], (one["fc.weight"] + two["fc.weight"]) / 2)
    repair = ["repair", merged, "--data", str(data), "--model-factory", "permutable:ResNet"]
    assert main([*repair, "--kind", "repair", "--out", mended]) == 0
