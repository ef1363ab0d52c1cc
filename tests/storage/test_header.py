"""Every rule of the format, broken one at a time."""

import json
import re
from pathlib import Path

import pytest
import torch

from mergewell.errors import CheckpointError
from mergewell.storage.header import HEADER_LIMIT, build_header, read_header
from mergewell.storage.spec import TensorSpec


def write(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(begin: int, end: int, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


MALFORMED = {
    "a hole": ({"a": entry(0, 2), "b": entry(3, 4)}, 4, "tensor 'b' begins at byte 3 .* a hole"),
    "a hole first": ({"a": entry(1, 2)}, 2, "tensor 'a' begins at byte 1 .* a hole"),
    "an overlap": ({"a": entry(0, 2), "b": entry(1, 3)}, 3, "tensor 'b' .* an overlap"),
    "the same place": ({"a": entry(0, 2), "b": entry(0, 2)}, 2, "an overlap"),
    "truncated": ({"a": entry(0, 4)}, 3, "is truncated"),
    "too long": ({"a": entry(0, 4)}, 5, "followed by bytes of no tensor"),
    "size": ({"a": entry(0, 4, [3])}, 4, r"'a' has 4 bytes where .* \[3\] need 3"),
    "overflow": ({"a": entry(0, 4, [2**62, 4])}, 4, "'a': shape .* overflows 64 bits"),
    "zero times huge": ({"a": entry(0, 4, [2**63, 0])}, 4, "'a': shape .* whole numbers"),
    "negative": ({"a": entry(0, 4, [-4, -1])}, 4, "'a': shape .* whole numbers"),
    "fraction": ({"a": entry(0, 4, [4.0])}, 4, "'a': shape .* whole numbers"),
    "truth": ({"a": entry(0, 1, [True])}, 1, "'a': shape .* whole numbers"),
    "no list": ({"a": entry(0, 4, 4)}, 4, "'a': shape 4 is not a list"),
    "dtype": ({"a": entry(0, 4, None, "Q8")}, 4, "'a': dtype 'Q8' is not supported"),
    "dtype null": ({"a": entry(0, 4, None, None)}, 4, "'a': dtype None is not supported"),
    "dtype list": ({"a": entry(0, 4, None, ["U8"])}, 4, "'a': dtype .* is not supported"),
    "backwards": ({"a": entry(4, 0, [4])}, 4, "'a': data_offsets .* begin and an end"),
    "three offsets": (
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}},
        1,
        "'a': data_offsets",
    ),
    "a field too few": ({"a": {"dtype": "U8", "shape": [1]}}, 1, "'a' must have exactly"),
    "a field too many": ({"a": entry(0, 1) | {"x": 1}}, 1, "'a' must have exactly"),
    "no entry": ({"a": 1}, 1, "'a' must have exactly"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "'__metadata__' must map texts to texts"),
    "metadata list": ({"__metadata__": []}, 0, "'__metadata__' must map texts to texts"),
    "an array": (b"[]", 0, "does not begin with '{'"),
    "blanks first": (b"  {}", 0, "does not begin with '{'"),
    "no JSON": (b'{"a": ', 0, "not valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', 0, "not valid JSON"),
    "a key twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        1,
        "key 'a' stands twice",
    ),
    "a field twice": (
        b'{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}}',
        1,
        "key 'dtype' stands twice",
    ),
    "too deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 0, "nested too deeply"),
    "a number too long": (b'{"a":' + b"9" * 5_000 + b"}", 0, "not valid JSON"),
}


@pytest.mark.parametrize("defect", MALFORMED)
def test_a_malformed_header_is_a_named_error(defect: str, tmp_path: Path):
    header, length, message = MALFORMED[defect]
    path = write(tmp_path / "model.safetensors", header, b"\0" * length)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert str(error.value).startswith(str(path))
    assert re.search(r"(download or save|convert)[^.]*\.$", str(error.value)), "no remedy"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, too few"),
        (b"\0" * 7, "has 7 bytes, too few"),
        (b"\0" * 8, "does not begin with"),
        ((100).to_bytes(8, "little") + b"{}", "truncated within its header"),
        ((HEADER_LIMIT + 1).to_bytes(8, "little"), "above the limit"),
        (b"\xff" * 16, "above the limit"),
        (b"version https://git-lfs", "above the limit"),
    ],
)
def test_a_damaged_length_is_a_named_error(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_every_truncation_is_refused(tmp_path: Path):
    whole = write(tmp_path / "a.safetensors", {"a": entry(0, 5), "b": entry(5, 6)}, b"\1" * 6)
    content = whole.read_bytes()
    for length in range(len(content)):
        whole.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_header(whole)


def test_an_unreadable_file_is_a_named_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"absent.safetensors cannot be read \(No such file"):
        read_header(tmp_path / "absent.safetensors")


def test_a_sound_header_gives_places_in_the_file(tmp_path: Path):
    fields = {"b": entry(2, 2, [0, 7]), "c": entry(2, 6, [], "F32"), "a": entry(0, 2)}
    path = write(tmp_path / "x.safetensors", {**fields, "__metadata__": {"k": "v"}}, b"\0" * 6)
    header = read_header(path)
    assert list(header.specs) == ["a", "b", "c"]
    assert header.specs["c"] == TensorSpec("c", torch.float32, ())
    assert header.specs["b"].shape == (0, 7)
    assert [header.offsets[name] - header.start for name in "abc"] == [0, 2, 2]
    assert header.size == path.stat().st_size == header.start + 6
    assert header.metadata == {"k": "v"}


def test_the_bytes_of_a_built_header_are_these():
    specs = (TensorSpec("b", torch.float16, (2,)), TensorSpec("a", torch.uint8, ()))
    content, header = build_header(specs, {"z": "1", "é": "2"})
    text = (
        '{"__metadata__":{"z":"1","é":"2"},'
        '"b":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},'
        '"a":{"dtype":"U8","shape":[],"data_offsets":[4,5]}}'
    ).encode()
    padded = text + b" " * (-len(text) % 8)
    assert content == len(padded).to_bytes(8, "little") + padded
    assert (header.start, header.size) == (len(content), len(content) + 5)
    assert header.offsets == {"b": len(content), "a": len(content) + 4}


def test_metadata_in_another_order_give_the_same_bytes():
    assert build_header((), {"a": "1", "b": "2"})[0] == build_header((), {"b": "2", "a": "1"})[0]


def test_a_built_header_is_read_back(tmp_path: Path):
    specs = (TensorSpec("b", torch.float16, (2,)), TensorSpec("a", torch.bool, (3, 0)))
    content, header = build_header(specs, {})
    path = tmp_path / "x.safetensors"
    path.write_bytes(content + b"\0" * 4)
    # The empty tensor and the one after it begin at the same byte, so the order may differ.
    assert read_header(path) == header


@pytest.mark.parametrize("name", ["a", "__metadata__"])
def test_a_name_that_cannot_be_written_is_refused(name: str):
    specs = (TensorSpec("a", torch.uint8, ()), TensorSpec(name, torch.uint8, ()))
    with pytest.raises(CheckpointError, match=f"'{name}' cannot be written twice"):
        build_header(specs, {})
