"""Model folders: which files hold the weights, and which others belong to the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from mergewell.errors import CheckpointError
from mergewell.storage.strict_json import read_object

INDEX_SUFFIX = ".index.json"
PIPELINE = "model_index.json"
"""What names the components of a diffusers folder."""
DIFFUSION = "diffusion_pytorch_model"
"""What diffusers calls weights of a component that is not of transformers."""
_KINDS = (
    ("model.safetensors", "model.safetensors.index.json"),
    (f"{DIFFUSION}.safetensors", f"{DIFFUSION}.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    (f"{DIFFUSION}.bin", f"{DIFFUSION}.bin.index.json"),
)
_SIDE_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
    "sentencepiece*.model",
    "spiece.model",
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint's weights are."""

    files: tuple[Path, ...]
    """Files of weights by name."""

    where: dict[str, str] | None
    """File name of every tensor, if an index says so."""


def is_there(path: Path) -> bool:
    """Return whether a file or folder exists; False also for a name that none can have."""
    try:
        return path.exists()
    except OSError:
        return False


def parts_of(path: str) -> tuple[str, ...]:
    """Return a model and the adapters on it, from `MODEL+ADAPTER`; a path that exists is one."""
    return (path,) if is_there(Path(path)) else tuple(path.split("+"))


def find_source(path: Path) -> Source:
    """Return the files of weights of a folder, an index or a single file.

    A folder's safetensors win over its `.bin`, as in transformers.

    Raises:
        CheckpointError: nothing there, nothing known there, or an index that cannot be followed.
    """
    if not is_there(path):
        raise CheckpointError(
            f"{path} does not exist; give a local file or folder, or ORG/NAME@REVISION to fetch "
            "it from the Hugging Face Hub."
        )
    if path.is_dir():
        return find_source(_main_file(path))
    if path.name.endswith(INDEX_SUFFIX):
        return _from_index(path)
    return Source(files=(path,), where=None)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the folder's `config.json`, or None without one.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = folder / "config.json"
    return read_object(path, remedy="mend or remove it") if path.is_file() else None


def find_side_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a model folder that are neither weights nor an index, by name."""
    found = {file for pattern in _SIDE_PATTERNS for file in folder.glob(pattern)}
    return tuple(sorted(file for file in found if file.is_file()))


def _main_file(folder: Path) -> Path:
    for pair in _KINDS:
        present = [folder / name for name in pair if (folder / name).exists()]
        if len(present) == 2:
            raise CheckpointError(
                f"{folder} has both {pair[0]} and {pair[1]}; give the one that is meant."
            )
        if present:
            return present[0]
    if (folder / PIPELINE).is_file():
        parts = sorted(path.name for path in folder.iterdir() if (path / "config.json").is_file())
        raise CheckpointError(
            f"{folder} is a pipeline of several models; give one of its folders "
            f"({', '.join(parts)}), or merge it by a recipe whose models are all such folders."
        )
    kinds = ("*.safetensors", "*.gguf")
    others = sorted(file.name for kind in kinds for file in folder.glob(kind))
    hint = f"give one of its files ({', '.join(others[:4])})" if others else "check the path"
    names = ", ".join(name for pair in _KINDS for name in pair)
    raise CheckpointError(f"{folder} has none of {names}; {hint}.")


def _from_index(index: Path) -> Source:
    remedy = "download the folder again"
    weight_map: object = read_object(index, remedy=remedy).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map' of tensors; {remedy}.")
    where: dict[str, str] = {}
    for name, file in cast("dict[str, object]", weight_map).items():
        if not isinstance(file, str) or not file:
            raise CheckpointError(f"{index}: tensor {name!r} has no file name; {remedy}.")
        # Told from the text: resolving it would refuse the hub's cache, which is all links.
        if PurePosixPath(file).name != file or file == "..":
            raise CheckpointError(
                f"{index}: tensor {name!r} is placed at {file!r}, outside the index's folder; "
                "do not trust this index."
            )
        where[name] = file
    files = tuple(index.parent / file for file in sorted(set(where.values())))
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{index} names {file.name}, which is missing; {remedy}.")
    return Source(files=files, where=where)
