import gc
import json
import pickle
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model

from mergewell.errors import CheckpointError
from mergewell.storage.checkpoint import Shard, open_checkpoint
from mergewell.storage.header import build_header
from mergewell.storage.spec import DTYPES, TensorSpec

INDEX = "model.safetensors.index.json"


def raw(tensor: torch.Tensor) -> list[int]:
    """The bytes of a tensor: NaNs and signed zeros count."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = prod(shape) * dtype.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        content = bytes(byte & 1 for byte in content)
    flat = torch.tensor(list(content), dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.text(min_size=1, max_size=5), tensors(), max_size=5), st.data())
def test_what_the_official_library_writes_is_read(
    held: dict[str, torch.Tensor], data: st.DataObject
):
    held.pop("__metadata__", None)
    with tempfile.TemporaryDirectory() as folder:
        save_file(held, Path(folder) / "x.safetensors")
        with open_checkpoint(f"{folder}/x.safetensors") as checkpoint:
            assert set(checkpoint) == set(held)
            for name, tensor in held.items():
                assert checkpoint.specs[name] == TensorSpec(name, tensor.dtype, tuple(tensor.shape))
                assert raw(checkpoint[name]) == raw(tensor)
                start = data.draw(st.integers(0, tensor.numel()))
                stop = data.draw(st.integers(start, tensor.numel()))
                block = checkpoint.read(name, start, stop)
                assert block.dtype == tensor.dtype
                assert raw(block) == raw(tensor.reshape(-1)[start:stop])


@pytest.mark.parametrize("shift", range(1, 9))
def test_a_misaligned_tensor_is_read(shift: int, tmp_path: Path):
    specs = [TensorSpec("pad", torch.uint8, (shift,)), TensorSpec("x", torch.float64, (3,))]
    x = torch.tensor([1.5, -2.25, 1e300], dtype=torch.float64)
    body = b"\7" * shift + bytes(x.view(torch.uint8).tolist())
    (tmp_path / "x.safetensors").write_bytes(build_header(specs, {})[0] + body)
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert torch.equal(checkpoint["x"], x)
    assert torch.equal(checkpoint.read("x", 1, 2), x[1:2])
    assert checkpoint["x"].data_ptr() % 8 == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded model folder."""
    where = {"b": "1.safetensors", "c": "1.safetensors", "a": "0.safetensors"}
    save_file({"b": torch.ones(2, 3), "c": torch.arange(4)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(3).half()}, tmp_path / "0.safetensors", {"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("")
    return tmp_path


def test_a_sharded_folder_is_one_checkpoint(folder: Path):
    for path in (folder, str(folder), folder / INDEX):
        checkpoint = open_checkpoint(path)
        assert sorted(checkpoint) == ["a", "b", "c"]
        assert [shard.file for shard in checkpoint.shards] == ["0.safetensors", "1.safetensors"]
        assert checkpoint.shards[0] == Shard("0.safetensors", ("a",))
        assert checkpoint.files == (folder / "0.safetensors", folder / "1.safetensors")
        assert checkpoint["b"].tolist() == [[1, 1, 1], [1, 1, 1]]
        assert checkpoint.content_bytes == 6 + 24 + 32
        assert checkpoint.config == {"model_type": "toy"}
        assert [file.name for file in checkpoint.side_files] == ["config.json", "tokenizer.json"]
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.path == Path(path)


def test_links_into_a_cache_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert len(open_checkpoint(snapshot)) == 3


def edit_index(folder: Path, **where: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(where)
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != "drop"}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"d": "2.safetensors"}, "names 2.safetensors, which is missing"),
        ({"d": "1.safetensors"}, "places tensor 'd' in 1.safetensors, which does not hold it"),
        ({"a": "1.safetensors", "b": "0.safetensors"}, "places tensor '.' in .*not hold it"),
        ({"d": "../x.safetensors"}, "'d' is placed at '../x.safetensors', outside"),
        ({"d": "/etc/x.safetensors"}, "'d' is placed at '/etc/x.safetensors', outside"),
        ({"d": ".."}, "'d' is placed at '..', outside"),
        ({"d": 1}, "'d' has no file name"),
        ({"d": ""}, "'d' has no file name"),
        ({"c": "drop"}, "1.safetensors holds tensor 'c', which the index does not list"),
    ],
)
def test_an_index_that_lies_is_a_named_error(folder: Path, where: dict[str, object], message: str):
    edit_index(folder, **where)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_a_named_error(folder: Path):
    save_file({"a": torch.zeros(3), "d": torch.zeros(1)}, folder / "2.safetensors")
    edit_index(folder, d="2.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in both 0.safetensors and 2.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_a_malformed_index_is_a_named_error(folder: Path, text: str):
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json .*; download the folder again\."):
        open_checkpoint(folder)


def test_a_malformed_config_is_a_named_error(folder: Path):
    (folder / "config.json").write_text("{'a': 1}")
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON .*; mend or remove"):
        open_checkpoint(folder)


def test_what_is_missing_is_said(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"org/model does not exist; .*ORG/NAME@REVISION"):
        open_checkpoint("org/model")
    with pytest.raises(CheckpointError, match=r"none of model.safetensors, .*; check the path"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "expert.safetensors")
    with pytest.raises(CheckpointError, match=r"give one of its files \(expert.safetensors\)"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a.npz is of no known kind"):
        open_checkpoint(tmp_path / "a.npz")


def test_a_folder_that_can_be_read_two_ways_is_refused(folder: Path):
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"both model.safetensors and model.safetensors.ind"):
        open_checkpoint(folder)
    assert len(open_checkpoint(folder / "model.safetensors")) == 1
    assert len(open_checkpoint(folder / INDEX)) == 3


def test_unknown_names_and_blocks_are_refused(folder: Path):
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="has no tensor 'z': known: a, b, c"):
        checkpoint.read("z")
    with pytest.raises(KeyError):
        checkpoint["z"]
    assert "z" not in checkpoint and checkpoint.get("z") is None
    for start, stop in ((0, 7), (-1, 2), (4, 3)):
        with pytest.raises(IndexError):
            checkpoint.read("b", start, stop)


def test_reading_copies_nothing_and_changes_never_reach_the_file(folder: Path):
    checkpoint = open_checkpoint(folder)
    assert checkpoint.read("b").data_ptr() == checkpoint.read("b").data_ptr()
    before = (folder / "1.safetensors").read_bytes()
    checkpoint.read("b").fill_(7)
    del checkpoint
    gc.collect()
    assert (folder / "1.safetensors").read_bytes() == before


def test_tensors_outlive_their_checkpoint(folder: Path):
    with open_checkpoint(folder) as checkpoint:
        tensor = checkpoint["b"]
    del checkpoint
    gc.collect()
    assert tensor.sum() == 6


def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path):
    specs = [TensorSpec("x", torch.uint8, (1 << 40,))]  # a sparse file: it takes no space
    content, header = build_header(specs, {})
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(content)
        file.truncate(header.size)
    assert open_checkpoint(path).read("x", (1 << 40) - 2).tolist() == [0, 0]


def test_a_pickled_checkpoint_opens_its_files_again(folder: Path):
    checkpoint = open_checkpoint(folder)
    checkpoint["b"]
    content = pickle.dumps(checkpoint)
    assert len(content) < 4000
    assert torch.equal(pickle.loads(content)["b"], checkpoint["b"])
    save_file({"b": torch.ones(3, 3), "c": torch.arange(4)}, folder / "1.safetensors")
    with pytest.raises(CheckpointError, match=r"1.safetensors changed from \d+ to \d+ bytes since"):
        pickle.loads(content)["b"]
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"1.safetensors cannot be read"):
        pickle.loads(content)["b"]


def test_threads_read_the_same(folder: Path):
    for _ in range(20):
        checkpoint = open_checkpoint(folder)
        with ThreadPoolExecutor(8) as pool:
            sums = list(pool.map(lambda name, c=checkpoint: float(c[name].sum()), "bcbcbcbc"))
        assert sums == [6, 6] * 4


def test_tied_names_in_the_metadata_can_be_read(tmp_path: Path):
    model = torch.nn.Module()
    model.first = torch.nn.Linear(2, 2, bias=False)
    model.second = torch.nn.Linear(2, 2, bias=False)
    model.second.weight = model.first.weight
    save_model(model, str(tmp_path / "model.safetensors"))
    checkpoint = open_checkpoint(tmp_path)
    (tied, kept), *rest = checkpoint.aliases.items()
    assert not rest and {tied, kept} == {"first.weight", "second.weight"}
    assert list(checkpoint) == [kept] and tied in checkpoint
    assert torch.equal(checkpoint[tied], model.first.weight)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth", "x.ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_pytorch_files_are_read(name: str, zipped: bool, nested: bool, tmp_path: Path):
    table = torch.arange(12.0).reshape(3, 4)
    held = {
        "embed": table,
        "turned": table.T,
        "head": torch.nn.Parameter(table),
        "step": torch.tensor(3),
        "empty": torch.empty(0, 2),
        "empty too": torch.empty(0, 2),
    }
    content = {"state_dict": held, "epoch": 3} if nested else held
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path if name.endswith(".bin") else tmp_path / name)
    assert list(checkpoint) == ["embed", "turned", "step", "empty", "empty too"]
    assert checkpoint.aliases == {"head": "embed"}
    assert checkpoint.shards == (Shard(name, tuple(checkpoint)),)
    for key, tensor in held.items():
        assert torch.equal(checkpoint[key], tensor)
    assert not checkpoint["head"].requires_grad
    for start in range(13):
        for stop in range(start, 13):
            assert checkpoint.read("turned", start, stop).tolist() == (
                table.T.reshape(-1)[start:stop].tolist()
            )
    assert torch.equal(pickle.loads(pickle.dumps(checkpoint))["turned"], table.T)


def test_sharded_pytorch_folders_are_read(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "0.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "1.bin")
    where = {"a": "0.bin", "b": "1.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert open_checkpoint(tmp_path)["b"].tolist() == [1, 1, 1]


class Trap:
    """Would make a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path):
    torch.save({"a": torch.ones(2), "trap": Trap(tmp_path / "sprung")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x.pt holds more than tensors, .*run code"):
        open_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list and no mapping"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch' is a int and no tensor"),
        ({3: torch.ones(1)}, "3 is a Tensor and no tensor|3 is a Tensor"),
        ({"state_dict": 3}, "'state_dict' is no mapping"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' is not dense"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "'a': dtype torch.complex64 is not supp"),
    ],
)
def test_a_pytorch_file_of_other_things_is_a_named_error(
    content: object, message: str, tmp_path: Path
):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("keep", [0, 1, 20, 300, -1])
def test_a_damaged_pytorch_file_is_a_named_error(keep: int, tmp_path: Path):
    torch.save({"a": torch.ones(200)}, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"x\.pt (cannot be loaded|holds more than)"):
        open_checkpoint(tmp_path / "x.pt")
