"""Vocabulary: the tokens of a model folder and their numbers, read from its files as they stand.

Known are `tokenizer.json` (every kind of model), `vocab.json` and `vocab.txt` with
`added_tokens.json`, and `tokenizer.model` or `spiece.model` of SentencePiece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mergewell.errors import CheckpointError
from mergewell.storage.base import Checkpoint
from mergewell.storage.folder import find_side_files
from mergewell.storage.strict_json import read_object

FAST, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_OURS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template",
         "sentencepiece", "spiece")  # fmt: skip
_REMEDY = "download the tokenizer again"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's tokens, as far as a merge asks for them."""

    folder: Path
    files: tuple[Path, ...]
    """All files of the tokenizer."""

    numbers: Mapping[str, int]
    """The number of each token: its row of the embeddings."""

    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """What `tokenizer.json` says of tokens that are not of its model, such as special ones."""

    template: str | None = None
    """The chat template."""

    special: Mapping[str, str] = field(default_factory=dict[str, str])
    """Tokens with a part to play, such as `eos_token`, by that part."""

    extra: tuple[str, ...] = ()
    """Tokens that the settings list as special beside those."""

    @property
    def rows(self) -> int:
        """One more than the largest number."""
        return max(self.numbers.values(), default=-1) + 1

    def file(self, name: str) -> Path | None:
        """Return the file of this name, if the tokenizer has it."""
        return next((file for file in self.files if file.name == name), None)


def is_of_tokenizer(file: Path) -> bool:
    """Return whether a file beside the weights belongs to the tokenizer."""
    return file.name.startswith(_OURS)


def tokenizer_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Return the tokenizer's files of a model; an adapter's own if it has some."""
    own = find_side_files(checkpoint.path) if checkpoint.path.is_dir() else ()
    files = tuple(file for file in own if is_of_tokenizer(file))
    return files or tuple(file for file in checkpoint.side_files if is_of_tokenizer(file))


def read_vocabulary(
    files: tuple[Path, ...], *, like: Vocabulary | None = None
) -> Vocabulary | None:
    """Return the vocabulary in these files; None where they hold none.

    Where `tokenizer.json` is that of `like`, byte for byte, it is not read a second time.

    Raises:
        CheckpointError: a file is damaged.
    """
    by_name = {file.name: file for file in files}
    numbers: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = {}
    if FAST in by_name:
        fast, known = by_name[FAST], like.file(FAST) if like is not None else None
        if like is not None and known is not None and known.read_bytes() == fast.read_bytes():
            numbers, added = like.numbers, like.added
        else:
            numbers, added = _fast(fast)
    elif "vocab.json" in by_name:
        numbers = _counted(read_object(by_name["vocab.json"], remedy=_REMEDY), by_name)
    elif "vocab.txt" in by_name:
        lines = by_name["vocab.txt"].read_text(encoding="utf-8").splitlines()
        numbers = _counted({line: number for number, line in enumerate(lines)}, by_name)
    elif found := [by_name[name] for name in _PIECES if name in by_name]:
        pieces = enumerate(_pieces(found[0]))
        numbers = _counted({piece: number for number, piece in pieces}, by_name)
    else:
        return None
    settings: dict[str, Any] = {}
    if SETTINGS in by_name:
        settings = read_object(by_name[SETTINGS], remedy=_REMEDY)
    template: object = settings.get("chat_template")
    if TEMPLATE in by_name:
        template = by_name[TEMPLATE].read_text(encoding="utf-8")
    return Vocabulary(
        folder=files[0].parent,
        files=files,
        numbers=numbers,
        added=added,
        template=template if isinstance(template, str) else None,
        special=_special(settings),
        extra=tuple(extra_of(settings)),
    )


EXTRA = ("extra_special_tokens", "additional_special_tokens")
"""What transformers calls the list of further special tokens, from version 5 on and before."""


def extra_of(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the further special tokens that a tokenizer's settings list."""
    for key in EXTRA:
        found: object = settings.get(key)
        for entry in cast("list[object]", found) if isinstance(found, list) else ():
            token = (
                cast("dict[str, Any]", entry).get("content") if isinstance(entry, dict) else entry
            )
            if isinstance(token, str):
                yield token


def _fast(path: Path) -> tuple[dict[str, int], dict[str, Mapping[str, Any]]]:
    data = read_object(path, remedy=_REMEDY)
    model, extra = data.get("model"), cast("object", data.get("added_tokens") or [])
    vocab: object = cast("dict[str, Any]", model).get("vocab") if isinstance(model, dict) else None
    try:
        if isinstance(vocab, list):  # Unigram: [token, score], numbered as they stand
            pairs = cast("list[tuple[str, float]]", vocab)
            numbers = {token: number for number, (token, _) in enumerate(pairs)}
        else:
            numbers = {str(t): int(n) for t, n in cast("dict[str, int]", vocab).items()}
        added = {str(entry["content"]): entry for entry in cast("list[dict[str, Any]]", extra)}
        return numbers | {token: int(entry["id"]) for token, entry in added.items()}, dict(added)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} holds no vocabulary ({error!r}); {_REMEDY}.") from error


def _counted(numbers: Mapping[str, Any], by_name: Mapping[str, Path]) -> dict[str, int]:
    found = dict(numbers)
    if "added_tokens.json" in by_name:
        found |= read_object(by_name["added_tokens.json"], remedy=_REMEDY)
    return {str(token): int(number) for token, number in found.items()}


def _special(settings: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value: object = settings.get(key)
        if isinstance(value, dict):
            value = cast("dict[str, Any]", value).get("content")
        if isinstance(value, str):
            found[key] = value
    return found


def _pieces(path: Path) -> Iterator[str]:
    """Yield the tokens of a SentencePiece model in order: field 1 of each field 1.

    Source: sentencepiece_model.proto, ModelProto.pieces and SentencePiece.piece.
    """
    data = path.read_bytes()
    for number, message in _fields(data, path):
        if number == 1:
            text = next((part for key, part in _fields(message, path) if key == 1), b"")
            yield text.decode("utf-8", errors="replace")


def _fields(data: bytes, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the fields of a protocol buffer that have a length."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at, path)
        kind = key & 7
        if kind == 2:
            size, at = _varint(data, at, path)
            yield key >> 3, data[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(data, at, path)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise CheckpointError(f"{path} is no SentencePiece model; {_REMEDY}.")


def _varint(data: bytes, at: int, path: Path) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise CheckpointError(f"{path} is no SentencePiece model; {_REMEDY}.")
