import hashlib
import json
from pathlib import Path

import pytest
import xxhash
from pydantic import ValidationError

from mergewell.errors import CheckpointError
from mergewell.storage.manifest import hash_file, read_manifest, verify_files

FIELDS = {
    "version": 1,
    "recipe": {"method": "average"},
    "inputs": [{"path": "a", "hash": "xxh3-128:0", "bytes": 1}],
    "tensors": 2,
    "tensors_changed": 1,
    "seed": 0,
    "versions": {"mergewell": "0.1.0"},
    "seconds": 0.5,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    outputs = []
    for name, kind in (("model.safetensors", "xxh3-128"), ("config.json", "sha256")):
        (tmp_path / name).write_bytes(b"content of " + name.encode())
        digest = hash_file(tmp_path / name, kind)
        outputs.append({"file": name, "hash": digest, "bytes": 11 + len(name)})
    (tmp_path / "manifest.json").write_text(json.dumps({**FIELDS, "outputs": outputs}))
    return tmp_path


def test_hashes_are_those_of_the_libraries(tmp_path: Path):
    content = bytes(range(256)) * 10_000  # longer than one piece
    (tmp_path / "x").write_bytes(content)
    assert hash_file(tmp_path / "x") == f"xxh3-128:{xxhash.xxh3_128(content).hexdigest()}"
    assert hash_file(tmp_path / "x", "sha256") == f"sha256:{hashlib.sha256(content).hexdigest()}"
    with pytest.raises(CheckpointError, match="absent cannot be read"):
        hash_file(tmp_path / "absent")


def test_a_sound_folder_has_no_problems(folder: Path):
    assert verify_files(folder) == []


def test_every_change_is_a_problem(folder: Path):
    (folder / "model.safetensors").write_bytes(b"content of model.safetensorS")
    (folder / "config.json").unlink()
    (folder / "left.safetensors").write_bytes(b"")
    assert verify_files(folder) == [
        "model.safetensors changed: its hash is not the one in manifest.json.",
        "config.json is missing.",
        "left.safetensors is not in manifest.json.",
    ]
    (folder / "model.safetensors").write_bytes(b"content")
    assert "model.safetensors has 7 bytes where 28 are due." in verify_files(folder)


def test_fields_of_later_versions_are_kept(folder: Path):
    content = json.loads((folder / "manifest.json").read_text()) | {"later": 3}
    (folder / "manifest.json").write_text(json.dumps(content))
    assert read_manifest(folder).model_dump()["later"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "'version': Input should be 1; merge again"),
        ({"outputs": [{"file": "a"}]}, r"'outputs.0.hash': Field required; merge again"),
        ({"outputs": [{"file": "../a", "hash": "sha256:0", "bytes": 1}]}, "outputs.0.file"),
    ],
)
def test_a_malformed_manifest_is_a_named_error(folder: Path, change: dict, message: str):
    (folder / "manifest.json").write_text(json.dumps({**FIELDS, "outputs": [], **change}))
    with pytest.raises(CheckpointError, match=message):
        verify_files(folder)


def test_an_unknown_hash_is_a_named_error(folder: Path):
    outputs = [{"file": "config.json", "hash": "md5:0", "bytes": 22}]
    (folder / "manifest.json").write_text(json.dumps({**FIELDS, "outputs": outputs}))
    with pytest.raises(CheckpointError, match=r"config.json has a hash of unknown kind 'md5'"):
        verify_files(folder)


def test_a_folder_without_manifest_is_a_named_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no manifest.json; give a folder"):
        verify_files(tmp_path)


def test_a_manifest_cannot_be_changed(folder: Path):
    with pytest.raises(ValidationError):
        read_manifest(folder).seed = 3
