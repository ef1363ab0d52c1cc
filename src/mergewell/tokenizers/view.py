"""VocabularyView: a model as it would be with another vocabulary, its embeddings' rows in place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mergewell.errors import CheckpointError
from mergewell.storage.base import Checkpoint
from mergewell.storage.spec import TensorSpec
from mergewell.storage.strict_json import parse_object
from mergewell.storage.weight_file import WeightFile
from mergewell.tokenizers.rows import MEAN, Origin, Rows

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|wte|shared|embed_in)\.weight$"
)
_HEAD = re.compile(
    r"(^|\.)(embed_out|lm_head|predictions|vocab_projector|output)(\.decoder)?\.(weight|bias)$"
)
_SIZE = "vocab_size"


def tables_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the tensors with a row for each token, and how many they have.

    They are told by their names, and have the rows of the first of the embeddings.
    """
    shapes = {name: spec.shape for name, spec in checkpoint.specs.items()}
    rows = next((s[0] for n, s in shapes.items() if _EMBEDDING.search(n) and len(s) == 2), 0)
    return {
        name: rows
        for name, shape in shapes.items()
        if rows and shape[:1] == (rows,) and (_EMBEDDING.search(name) or _HEAD.search(name))
    }


class VocabularyView(Checkpoint):
    """A model whose tables have the rows of a joint vocabulary; other tensors are its own."""

    def __init__(
        self,
        inner: Checkpoint,
        rows: Rows,
        *,
        members: Sequence[Checkpoint],
        renumbered: Mapping[int, int],
        side_files: Mapping[Path, bytes | None],
        files: Sequence[Path] = (),
    ) -> None:
        """Present `inner` with rows in other places.

        `members` are the models that `rows` counts, `renumbered` the new numbers of tokens by
        their old ones, `side_files` the files that go with the result, with the bytes of those
        that are not as they stand, and `files` what the vocabulary was read from.
        """
        self.inner, self._rows, self._members = inner, rows, tuple(members)
        self._means: dict[str, Tensor] = {}
        self.tables = tables_of(inner)
        self.path, self.metadata, self.aliases = inner.path, inner.metadata, inner.aliases
        self.files = tuple(dict.fromkeys((*inner.files, *files)))
        self.shards = inner.shards
        count = len(rows.own)
        self.specs = {
            name: TensorSpec(name, spec.dtype, (count, *spec.shape[1:]))
            if name in self.tables
            else spec
            for name, spec in inner.specs.items()
        }
        self._numbering = (count, dict(renumbered))
        self.config = None if inner.config is None else _renumbered(inner.config, *self._numbering)
        self._side = dict(side_files)
        self.side_files = tuple(side_files)

    def weight_files(self) -> tuple[WeightFile, ...]:
        """Return the opened files of the model itself."""
        return self.inner.weight_files()

    def close(self) -> None:
        """Let go of the model's files."""
        self.inner.close()

    def side_file(self, file: Path) -> bytes:
        """Return a side file: of the joint tokenizer, or a configuration that counts its rows."""
        known = self._side.get(file)
        if known is not None:
            return known
        content = self.inner.side_file(file)
        if file.name not in ("config.json", "generation_config.json"):
            return content
        data = parse_object(content, where=str(file), remedy="download the folder again")
        changed = _renumbered(data, *self._numbering)
        if changed == data:
            return content
        return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()

    def _read_block(self, spec: TensorSpec, start: int, stop: int) -> Tensor:
        if spec.name not in self.tables:
            return self.inner.read(spec.name, start, stop)
        row = spec.numel // spec.shape[0]
        if start == stop or not row:
            return torch.empty(0, dtype=spec.dtype)
        first, last = start // row, -(-stop // row)
        own = self._rows.own[first:last]
        if own[0] >= 0 and bool(np.all(np.diff(own) == 1)):  # side by side in the file as well
            begin = int(own[0]) * row - first * row
            return self.inner.read(spec.name, begin + start, begin + stop)
        made = torch.empty(last - first, row, dtype=spec.dtype)
        cuts = [0, *(np.flatnonzero((np.diff(own) != 1) | (own[1:] < 0)) + 1).tolist(), len(own)]
        for begin, end in pairwise(cuts):
            if own[begin] >= 0:
                at = int(own[begin])
                found = self.inner.read(spec.name, at * row, (at + end - begin) * row)
                made[begin:end] = found.view(end - begin, row)
            else:
                made[begin] = self._other(spec, row, self._rows.others[first + begin])
        return made.reshape(-1)[start - first * row : stop - first * row]

    def _other(self, spec: TensorSpec, row: int, origin: Origin) -> Tensor:
        """Return a row that the model does not have itself."""
        if origin == MEAN:
            return self._mean(spec, row)
        parts = [
            self._members[index].read(spec.name, at * row, (at + 1) * row).double()
            for index, at in origin
            if spec.name in self._members[index]
        ]
        if not origin:
            return torch.zeros(row, dtype=spec.dtype)
        if not parts:
            raise CheckpointError(
                f"{self.path}: a row of {spec.name} is to come from a model that has no such "
                "tensor; tie or untie the embeddings of all models alike."
            )
        return (torch.stack(parts).sum(0) / len(parts)).to(spec.dtype)

    def _mean(self, spec: TensorSpec, row: int) -> Tensor:
        if spec.name not in self._means:
            count = self.inner.spec(spec.name).shape[0]
            step = max(1, (1 << 20) // row)
            total = torch.zeros(row, dtype=torch.float64)
            for begin in range(0, count, step):
                end = min(begin + step, count)
                part = self.inner.read(spec.name, begin * row, end * row).view(-1, row)
                total += part.double().sum(0)
            self._means[spec.name] = (total / count).to(spec.dtype)
        return self._means[spec.name]


def _renumbered(data: Mapping[str, Any], size: int, numbers: Mapping[int, int]) -> dict[str, Any]:
    """Return a configuration for so many rows, and other numbers of its special tokens."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            result[key] = _renumbered(cast("dict[str, Any]", value), size, numbers)
        elif key == _SIZE and isinstance(value, int) and size:
            result[key] = size
        elif key.endswith("_token_id") and isinstance(value, int):
            result[key] = numbers.get(value, value)
        elif key.endswith("_token_id") and isinstance(value, list):
            result[key] = [numbers.get(n, n) for n in cast("list[int]", value)]
        else:
            result[key] = value
    return result
