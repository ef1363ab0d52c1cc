"""Inputs: read a few unlabelled ones, whatever they are, and cut them into batches.

Texts in a JSONL file, a folder of images, or named tensors in a safetensors or npz file.
Shapes: N samples, T tokens, H and W pixels.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from mergewell.errors import DataError
from mergewell.models.dataflow import Batch

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
"""Files of other suffixes in a folder of images (licences, labels) are not images."""


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """How an image becomes a tensor: resized to (H, W), then (pixel / 255 - mean) / std."""

    size: tuple[int, int]
    """Height and width, in pixels."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Of red, green and blue, in [0, 1]."""
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    shortest_edge: int | None = None
    """If given: resize the shorter side to this, keeping proportions, then cut out the centre."""


def load_inputs(
    path: str | Path,
    *,
    model_folder: str | Path | None = None,
    limit: int | None = None,
    tokens: int = 128,
    images: ImageFormat | None = None,
) -> Batch:
    """Return the inputs in a file or folder: one tensor, or tensors by argument name.

    - `.jsonl`: a text (a string, or `{"text": ...}`) a line, tokenised with the tokenizer in
      `model_folder`, padded and cut to `tokens`
    - a folder: its images, in the order of their paths, under `images` or under what
      `preprocessor_config.json` in `model_folder` says; one tensor [N, 3, H, W]
    - `.safetensors` or `.npz`: as they are (floats as float32), [N, ...] each; a file with a
      single tensor gives that tensor

    With more than `limit` samples, that many are taken at even distances, so that a sorted file
    is covered whole.

    Raises:
        DataError: the path is missing, of another kind, empty or damaged; tensors differ in N; or
            tokenizer or image format cannot be found.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{limit} samples were asked for; ask for at least 1.")
    path, model = Path(path), None if model_folder is None else Path(model_folder)
    if path.is_dir():
        return _images(path, images or _image_format(model), limit)
    if not path.is_file():
        raise DataError(f"There is no calibration data at {path}; give a file or a folder.")
    readers: dict[str, Callable[[Path], dict[str, Tensor]]] = {
        ".safetensors": _safetensors,
        ".npz": _npz,
    }
    if path.suffix == ".jsonl":
        return _tokenised(_spread(_texts(path), limit), path, model, tokens)
    if path.suffix not in readers:
        raise DataError(
            f"{path} is no calibration data that mergewell reads: give a .jsonl of texts, a folder "
            "of images, or a .safetensors or .npz of named inputs."
        )
    inputs = readers[path.suffix](path)
    count = _count(inputs, path)
    index = torch.tensor(_spread(range(count), limit))
    chosen = {name: _plain_dtype(tensor)[index] for name, tensor in inputs.items()}
    return next(iter(chosen.values())) if len(chosen) == 1 else chosen


def input_files(path: str | Path) -> tuple[Path, ...]:
    """Return the files that `load_inputs` reads: the one, or all images of a folder.

    Raises:
        DataError: there is nothing at the path.
    """
    place = Path(path)
    if place.is_dir():
        return tuple(sorted(_images_in(place)))
    if not place.is_file():
        raise DataError(f"There are no inputs at {place}; give a file or a folder.")
    return (place,)


def batches(inputs: Batch, size: int) -> Iterator[Batch]:
    """Yield the inputs in order, `size` samples at a time; the last batch may be smaller.

    Raises:
        DataError: `size` is less than 1.
    """
    if size < 1:
        raise DataError(f"Batches of {size} samples were asked for; ask for at least 1.")
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
    for start in range(0, len(first), size):
        if isinstance(inputs, Tensor):
            yield inputs[start : start + size]
        else:
            yield {name: tensor[start : start + size] for name, tensor in inputs.items()}


def batches_by_length(inputs: Mapping[str, Tensor], size: int) -> Iterator[Batch]:
    """Yield texts with others of their length, the longest first, without padding none needs.

    Texts of one length cost less than half of what texts in any order do, all of them padded to
    the longest; every text is there once, and answers to its tokens are the same. Inputs without
    an `attention_mask`, [N, T], or padded at their beginning, stay as long as they are.

    Raises:
        DataError: `size` is less than 1.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        yield from batches(dict(inputs), size)
        return
    places = torch.arange(1, mask.shape[1] + 1)
    lengths = (mask.ne(0) * places).amax(1)
    order = lengths.argsort(descending=True, stable=True)
    for batch in batches({name: tensor[order] for name, tensor in inputs.items()}, size):
        assert not isinstance(batch, Tensor)
        longest = int((batch["attention_mask"].ne(0) * places).amax())
        yield {
            name: tensor[:, :longest] if tensor.shape[1:2] == mask.shape[1:] else tensor
            for name, tensor in batch.items()
        }


def _spread(items: Any, limit: int | None) -> list[Any]:
    total = len(items)
    wanted = total if limit is None else min(limit, total)
    return [items[index * total // wanted] for index in range(wanted)]


def _count(inputs: Mapping[str, Tensor], path: Path) -> int:
    """Return N, which all inputs must share."""
    counts = {name: len(tensor) if tensor.ndim else 0 for name, tensor in inputs.items()}
    if not counts or 0 in counts.values():
        empty = ", ".join(name for name, count in counts.items() if not count)
        raise DataError(f"{path} holds no samples{f' in {empty}' if empty else ''}; add some.")
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise DataError(f"{path}: inputs differ in their number of samples ({listed}); make equal.")
    return next(iter(counts.values()))


def _plain_dtype(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} is no readable safetensors file ({error}); write it anew."
        ) from error


def _npz(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise DataError(
            f"{path} is no npz file of plain numeric arrays ({error}); write it with np.savez."
        ) from error


def _texts(path: Path) -> list[str]:
    texts: list[str] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); convert it.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error.msg}); mend it.") from error
        held: Any = {"text": entry} if isinstance(entry, str) else entry
        text: object = held.get("text") if hasattr(held, "get") else None
        if not isinstance(text, str):
            raise DataError(
                f"{path}, line {number} holds no text: write a JSON string or "
                '{"text": "..."} on each line.'
            )
        texts.append(text)
    if not texts:
        raise DataError(f"{path} holds no texts; write one JSON string on each line.")
    return texts


def _tokenised(texts: list[str], path: Path, model: Path | None, tokens: int) -> Batch:
    if model is None:
        raise DataError(
            f"{path} holds texts, which need a model folder with a tokenizer; give one."
        )
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise DataError(
            f"{path} holds texts, which need transformers: pip install 'mergewell[models]'."
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(model), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(
            f"{model} holds no tokenizer that transformers can load ({reason}); add its files."
        ) from error
    if tokenizer.pad_token is None:  # padding is masked out, any token will do
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(
        texts, padding=True, truncation=True, max_length=tokens, return_tensors="pt"
    )
    return dict(encoded)


def _image_format(model: Path | None) -> ImageFormat:
    path = model / "preprocessor_config.json" if model else None
    if path is None or not path.is_file():
        raise DataError(
            "Images need a size: give one, or a model folder that holds preprocessor_config.json."
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        size, crop = config.get("size"), config.get("crop_size")
        edge: Any = size.get("shortest_edge") if size and hasattr(size, "get") else None
        target: Any = crop if crop and config.get("do_center_crop", True) else size
        return ImageFormat(
            _height_width(target),
            tuple(config.get("image_mean") or (0.0, 0.0, 0.0)),
            tuple(config.get("image_std") or (1.0, 1.0, 1.0)),
            edge if target is crop else None,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} does not state an image size ({error}); give the size.") from error


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    edge = size.get("shortest_edge")
    return (edge, edge) if edge else (size["height"], size["width"])


def _images_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _images(folder: Path, form: ImageFormat, limit: int | None) -> Tensor:
    try:
        image_module: Any = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise DataError(f"{folder} holds images, which need Pillow: pip install pillow.") from error
    found = sorted(_images_in(folder))
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); add some.")
    mean, std = (torch.tensor(part)[:, None, None] for part in (form.mean, form.std))
    result: list[Tensor] = []
    for path in _spread(found, limit):
        try:
            with image_module.open(path) as image:
                pixels = np.asarray(_resized(image.convert("RGB"), form))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no readable image ({error}); remove or mend it.") from error
        result.append((torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std)
    return torch.stack(result)


def _resized(image: Any, form: ImageFormat) -> Any:
    """Resize with antialiasing (bilinear), and cut out the centre if the format says so."""
    height, width = form.size
    if form.shortest_edge is None:
        return image.resize((width, height), 2)
    scale = form.shortest_edge / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), 2)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
