"""Union: the reference's tokenizer with the tokens that only other models have behind its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mergewell.errors import PlanError
from mergewell.storage.strict_json import read_object
from mergewell.tokenizers.vocabulary import EXTRA, FAST, SETTINGS, Vocabulary

_OUTDATED = ("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer.model",
             "spiece.model")  # fmt: skip
"""Other forms of the same vocabulary, which would no longer say the same as tokenizer.json."""
_BY_WORD = ("WordLevel", "WordPiece")
"""Kinds of models whose words can be joined by others; those of pieces would need their rules."""


@dataclass(frozen=True, slots=True)
class Union:
    """A joint vocabulary and its files."""

    numbers: Mapping[str, int]
    files: Mapping[Path, bytes | None]
    """Of the tokenizer, with the bytes of those that are not as they stand."""

    warnings: tuple[str, ...]


def join(reference: Vocabulary, others: Sequence[tuple[Path, Vocabulary]]) -> Union:
    """Return the reference's vocabulary with all that the others have more.

    Numbers of the reference's own tokens stay; others follow, model by model, in their order.

    Raises:
        PlanError: the reference has no tokenizer.json, to which tokens could be added.
    """
    numbers, entries = dict(reference.numbers), dict[str, Mapping[str, Any]]()
    plain: list[str] = []
    following = reference.rows
    warnings: list[str] = []
    for path, other in others:
        before = len(plain)
        for token in sorted(other.numbers, key=lambda token: other.numbers[token]):
            if token in numbers:
                continue
            numbers[token], following = following, following + 1
            if token in other.added:
                entries[token] = other.added[token]
            else:
                plain.append(token)
        if len(plain) > before:
            warnings.append(
                f"{path}: {len(plain) - before} ordinary tokens of its vocabulary, such as "
                f"{plain[before]!r}, are not in {reference.folder}; they get their rows, but only "
                "texts that hold them as they stand are cut into them."
            )
    unchanged = dict.fromkeys(reference.files)
    if len(numbers) == len(reference.numbers):
        return Union(numbers, unchanged, ())
    fast = reference.file(FAST)
    if fast is None:
        raise PlanError(
            f"{reference.folder} has no {FAST}, to which tokens of other models could be added; "
            "save its tokenizer as a fast one."
        )
    files = {file: None for file in unchanged if file.name not in _OUTDATED}
    data = read_object(fast, remedy="download the tokenizer again")
    model = cast("dict[str, Any]", data["model"])
    if model.get("type") in _BY_WORD:
        model["vocab"] |= {token: numbers[token] for token in plain}
        warnings = []
    else:
        entries |= {token: {"special": False} for token in plain}
    added = [{**_ENTRY, **entry, "content": t, "id": numbers[t]} for t, entry in entries.items()]
    data["added_tokens"] = [*(data.get("added_tokens") or []), *sorted(added, key=_number)]
    extra = [t for _, other in others for t in other.extra if t in entries]
    settings = _settings(reference, added, [*dict.fromkeys(extra)])
    return Union(numbers, files | {fast: _text(data)} | settings, tuple(warnings))


_ENTRY = {
    "id": 0, "content": "", "single_word": False, "lstrip": False, "rstrip": False,
    "normalized": False, "special": False,
}  # fmt: skip


def _number(entry: Mapping[str, Any]) -> int:
    return entry["id"]


def _settings(
    reference: Vocabulary, added: Sequence[Mapping[str, Any]], extra: Sequence[str]
) -> dict[Path, bytes]:
    """Return tokenizer_config.json with the new tokens, where it lists such tokens at all.

    Those in `extra` were listed as special by another model, and are in the result.
    """
    path = reference.file(SETTINGS)
    data = read_object(path, remedy="download the tokenizer again") if path is not None else {}
    known: object = data.get("added_tokens_decoder")
    if path is None or not (isinstance(known, dict) or extra):
        return {}
    if isinstance(known, dict):
        for entry in added:
            about = {key: value for key, value in entry.items() if key != "id"}
            cast("dict[str, Any]", known)[str(entry["id"])] = about
    if extra:
        # the older name, which all versions read, unless the file has the other
        key = next((key for key in EXTRA if isinstance(data.get(key), list)), EXTRA[-1])
        data[key] = [*(data.get(key) or []), *extra]
    return {path: _text(data)}


def _text(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
