"""Layer stacks: ranges of layers, of one checkpoint or of several, read as one model.

Layers are the modules of the longest list that the tensor names count from 0, such as
`model.layers.<i>.`, `transformer.h.<i>.` or `encoder.layer.<i>.`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from mergewell.errors import CheckpointError
from mergewell.storage.base import Checkpoint, Shard
from mergewell.storage.spec import TensorSpec
from mergewell.storage.weight_file import WeightFile

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_OUTPUT_EMBEDDING = re.compile(r"(^|[._])embed_out([._]|$)")
_HEAD = re.compile(r"(^|[._])(embed_out|lm_head|head|norm|ln_f|ln_post|final\w*|score|classifier|"
                   r"fc|pooler|output)([._]|$)", re.IGNORECASE)  # fmt: skip
_EMBEDDING = re.compile(
    r"(^|[._])(\w*embed(ding)?s?|\w*embeddings?|wte|wpe|patch\w*|\w+_token|stem\w*|pos\w*|ln_pre|"
    r"rotary\w*|conv1|conv_stem)([._]|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class LayerPiece:
    """Layers [start, stop) of a checkpoint."""

    checkpoint: Checkpoint
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Where the layers stand in tensor names: `prefix.<i>.rest`, i in [0, count)."""

    prefix: str
    count: int

    def split(self, name: str) -> tuple[int, str] | None:
        """Return a tensor's layer and the rest of its name; None for one outside the layers."""
        if not name.startswith(f"{self.prefix}."):
            return None
        number, _, rest = name[len(self.prefix) + 1 :].partition(".")
        return (int(number), rest) if number.isdecimal() else None

    def join(self, layer: int, rest: str) -> str:
        """Return the name of a tensor of a layer."""
        return f"{self.prefix}.{layer}.{rest}" if rest else f"{self.prefix}.{layer}"


def find_layers(names: Iterable[str], *, where: str) -> LayerNames:
    """Return where the layers stand: the longest list of modules numbered from 0 without a gap.

    Lists inside a numbered module, such as the experts of a layer, are not looked at.

    Raises:
        CheckpointError: no such list, or two of the same length; the sentence begins with `where`.
    """
    lists: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if i > 0 and part.isdecimal()), None)
        if place is not None:
            lists.setdefault(".".join(parts[:place]), set()).add(int(parts[place]))
    counted = {p: len(found) for p, found in lists.items() if found == set(range(len(found)))}
    if not counted:
        raise CheckpointError(
            f"{where}: no tensor name counts layers, such as model.layers.0; layer ranges and "
            "gradients need them."
        )
    longest = max(counted.values())
    prefixes = sorted(prefix for prefix, count in counted.items() if count == longest)
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{where}: {prefixes[0]} and {prefixes[1]} both count {longest} layers, so it is not "
            "clear which are meant; layer ranges need a model with one longest list."
        )
    return LayerNames(prefixes[0], longest)


class LayerStack(Checkpoint):
    """Ranges of layers read as one model whose layers are numbered from 0.

    Outside the layers, embeddings are the first piece's; norm and head the last piece's. No file
    of the result is larger than the largest of its sources, unless a single tensor is.
    """

    def __init__(self, pieces: Sequence[LayerPiece]) -> None:
        """Stack the pieces; the checkpoints are closed with the stack.

        Raises:
            CheckpointError: no layers found, a range that the checkpoint does not have, pieces
                that count layers under different names, or a tensor outside the layers of which
                it is not clear whether it stands before or after them.
        """
        first, last = pieces[0].checkpoint, pieces[-1].checkpoint
        self._pieces = tuple(pieces)
        self._layers = [find_layers([*p.checkpoint], where=str(p.checkpoint.path)) for p in pieces]
        self._check()
        self._homes: dict[str, tuple[Checkpoint, str]] = {}
        outside = [name for name in first if self._layers[0].split(name) is None]
        for name in outside:
            if _is_before(name, first, last):
                self._homes[name] = (first, name)
        self._add_layers()
        for name in (name for name in last if self._layers[-1].split(name) is None):
            if not _is_before(name, first, last):
                self._homes[name] = (last, name)
        self.path, self.metadata = first.path, first.metadata
        self.specs = {
            name: TensorSpec(name, (spec := home.spec(old)).dtype, spec.shape)
            for name, (home, old) in self._homes.items()
        }
        self.aliases = {n: kept for n, kept in first.aliases.items() if kept in outside}
        files = [file for piece in pieces for file in piece.checkpoint.files]
        self.files = tuple(dict.fromkeys(files))
        self.shards = self._cut()
        self.config = self._stacked_config()
        self.side_files = first.side_files

    def weight_files(self) -> tuple[WeightFile, ...]:
        """Return the opened files of all pieces."""
        return tuple(file for piece in self._pieces for file in piece.checkpoint.weight_files())

    def close(self) -> None:
        """Let go of the files of all pieces."""
        for piece in self._pieces:
            piece.checkpoint.close()

    def side_file(self, file: Path) -> bytes:
        """Return the bytes of a side file; `config.json` counts the layers of the stack."""
        if file.name == "config.json" and self.config is not None:
            return (json.dumps(self.config, indent=2, ensure_ascii=False) + "\n").encode()
        return super().side_file(file)

    def _read_block(self, spec: TensorSpec, start: int, stop: int) -> Tensor:
        home, old = self._homes[spec.name]
        return home.read(old, start, stop)

    def _check(self) -> None:
        for piece, layers in zip(self._pieces, self._layers, strict=True):
            path = piece.checkpoint.path
            if not 0 <= piece.start < piece.stop <= layers.count:
                raise CheckpointError(
                    f"{path}: layers {piece.start} to {piece.stop} are asked for, but it has "
                    f"{layers.count} ({layers.prefix}.0 to {layers.count - 1}); mend the range."
                )
            if layers.prefix != self._layers[0].prefix:
                raise CheckpointError(
                    f"{path} counts its layers under {layers.prefix}, but "
                    f"{self._pieces[0].checkpoint.path} under {self._layers[0].prefix}; stack "
                    "models of one architecture."
                )

    def _add_layers(self) -> None:
        offset = 0
        for piece, layers in zip(self._pieces, self._layers, strict=True):
            inside: dict[int, list[tuple[str, str]]] = {}
            for old in piece.checkpoint:
                if (found := layers.split(old)) is not None:
                    inside.setdefault(found[0], []).append((found[1], old))
            for layer in range(piece.start, piece.stop):
                for rest, old in inside[layer]:
                    new = layers.join(offset + layer - piece.start, rest)
                    self._homes[new] = (piece.checkpoint, old)
            for tied in piece.checkpoint.aliases:
                if layers.split(tied) is not None:
                    raise CheckpointError(
                        f"{piece.checkpoint.path}: {tied} is tied to another tensor, so its layer "
                        "cannot be moved; save the model untied."
                    )
            offset += piece.stop - piece.start

    def _cut(self) -> tuple[Shard, ...]:
        sizes = (
            sum(piece.checkpoint.spec(name).nbytes for name in shard.names)
            for piece in self._pieces
            for shard in piece.checkpoint.shards
        )
        limit = max(sizes)
        groups: list[list[str]] = [[]]
        filled = 0
        for name, spec in self.specs.items():
            if groups[-1] and filled + spec.nbytes > limit:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += spec.nbytes
        return tuple(Shard(f"stack-{i}", tuple(group)) for i, group in enumerate(groups, 1))

    def _stacked_config(self) -> Mapping[str, Any] | None:
        configs = [piece.checkpoint.config for piece in self._pieces]
        if configs[0] is None:
            return None
        count = sum(piece.stop - piece.start for piece in self._pieces)
        return _restacked(configs[0], [c or {} for c in configs], self._pieces, self._layers, count)


def _restacked(
    config: Mapping[str, Any],
    configs: Sequence[Mapping[str, Any]],
    pieces: Sequence[LayerPiece],
    layers: Sequence[LayerNames],
    count: int,
) -> dict[str, Any]:
    """Return `config`, the first of `configs`, for the stacked layers; nested objects as well."""
    result = dict(config)
    for key, value in config.items():
        others = [other.get(key) for other in configs]
        if key in _COUNTS and value == layers[0].count:
            result[key] = count
        elif isinstance(value, dict):
            nested = [
                cast("dict[str, Any]", other) if isinstance(other, dict) else {} for other in others
            ]
            result[key] = _restacked(nested[0], nested, pieces, layers, count)
        elif isinstance(value, list) and "layer" in key:
            lists = [cast("list[Any]", other) for other in others if isinstance(other, list)]
            # One entry a layer in every piece, such as layer_types; other lists are left alone.
            if [len(entries) for entries in lists] == [found.count for found in layers]:
                result[key] = [
                    entry
                    for entries, piece in zip(lists, pieces, strict=True)
                    for entry in entries[piece.start : piece.stop]
                ]
    return result


def _is_before(name: str, first: Checkpoint, last: Checkpoint) -> bool:
    before = stands_before(name)
    if before is None and first is not last:
        raise CheckpointError(
            f"{first.path}: it is not clear whether {name} stands before or after the layers, so "
            f"whether to take it from here or from {last.path}; stack layers of one model, or "
            "leave it out of the files."
        )
    return before is True


def stands_before(name: str) -> bool | None:
    """Return whether a tensor outside the layers stands before them; None if its name is mute."""
    if _OUTPUT_EMBEDDING.search(name):
        return False
    if _EMBEDDING.search(name):
        return True
    return False if _HEAD.search(name) else None
