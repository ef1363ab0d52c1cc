"""What the keys of a LoRA adapter do to which tensors of its base.

Keys, behind `base_model.model.`: MODULE.lora_A.weight [r, I] and MODULE.lora_B.weight [O, r], or
MODULE.lora_embedding_A and _B; MODULE.lora_B.bias (`lora_bias`); MODULE.lora_magnitude_vector
(DoRA); and whole tensors in place of the base's (`modules_to_save`, `bias`).

Source: the layout is that of PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import cast

from mergewell.errors import CheckpointError
from mergewell.storage.adapter_config import AdapterSettings
from mergewell.storage.base import Checkpoint
from mergewell.storage.spec import TensorSpec, is_mergeable

PREFIX = "base_model.model."
"""What PEFT puts before the names of modules."""

_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|"
    r"lora_embedding_B|lora_magnitude_vector)(\.weight)?$"
)
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")
_UNKNOWN = re.compile(r"(^|\.)(lora_\w*|token_adapter|trainable_tokens\w*|original_module)(\.|$)")
_GENERATES = re.compile(r"LMHead|(Causal|Masked|Seq2Seq)LM|Generation|PreTraining")
_REMEDY = "download or save the adapter again"


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter does to one tensor, by the keys of its own file."""

    whole: str | None = None
    """A tensor in place of the base's."""

    left: str | None = None
    right: str | None = None
    """The factors: change = scaling * left right as matrices, or its transpose if `turned`."""

    turned: bool = False
    magnitude: str | None = None
    """DoRA: the norms of the rows of the result."""

    added: str | None = None
    """A vector that is added, times scaling."""

    scaling: float = 1.0

    @property
    def computed(self) -> bool:
        """True unless a stored tensor is the result as it stands."""
        return self.left is not None or self.added is not None


def find_changes(
    adapter: Checkpoint, settings: AdapterSettings, base: Checkpoint
) -> dict[str, Change]:
    """Return the change of every tensor that an adapter touches, by the base's names.

    Raises:
        CheckpointError: a key that is not understood, or tensors that do not fit the base.
    """
    return _Reader(adapter, settings, base).changes()


class _Reader:
    def __init__(self, adapter: Checkpoint, settings: AdapterSettings, base: Checkpoint) -> None:
        self._adapter, self._settings, self._base = adapter, settings, base
        self._path = adapter.path.parent

    def changes(self) -> dict[str, Change]:
        """Return the change of every tensor that is touched."""
        parts: dict[str, dict[str, str]] = {}
        wholes: dict[str, str] = {}
        for key in self._adapter:
            name = key.removeprefix(PREFIX)
            if (found := _PART.match(name)) is not None:
                parts.setdefault(found["module"], {})[found["part"]] = key
            elif _UNKNOWN.search(name):
                raise CheckpointError(
                    f"{self._path}: what {key!r} does to the base is not known here; fold the "
                    "adapter into its base with peft (merge_and_unload) first."
                )
            else:
                wholes[_WRAPPERS.sub("", name)] = key
        if not parts:
            raise CheckpointError(f"{self._path}: no tensor is a LoRA factor; {_REMEDY}.")
        renamed = _renaming([f"{module}.weight" for module in parts], self._base, self._path)
        changes: dict[str, Change] = {}
        for name, key in wholes.items():
            changes[self._whole_name(renamed(name), key)] = Change(whole=key)
        for module, keys in parts.items():
            name = renamed(f"{module}.weight")
            changes[name] = self._low_rank(module, name, keys, changes.get(name, Change()))
            if (bias := keys.get("lora_B.bias")) is not None:
                self._add_bias(renamed(f"{module}.bias"), bias, changes[name].scaling, changes)
        return changes

    def _whole_name(self, name: str, key: str) -> str:
        if name not in self._base:
            return name  # a new head: who merges hears of it
        self._check_untied(name)
        spec, due = self._adapter.specs[key], self._base.spec(name)
        if spec.shape != due.shape:
            raise CheckpointError(
                f"{self._path}: {key!r} has shape {list(spec.shape)} but the base's tensor "
                f"{list(due.shape)}; name the base that the adapter was trained on."
            )
        return name

    def _low_rank(self, module: str, name: str, keys: Mapping[str, str], change: Change) -> Change:
        embedding = any(part.startswith("lora_embedding") for part in keys)
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else (
            "lora_A.weight", "lora_B.weight"
        )  # fmt: skip
        for part in names:
            if part not in keys:
                raise CheckpointError(f"{self._path}: {module} lacks its {part}; {_REMEDY}.")
        right, left = (keys[part] for part in names)
        a, b = (self._adapter.specs[key].shape for key in (right, left))
        if len(a) < 2 or len(b) < 2 or not prod(a) or not b[0] or a[0] != prod(b[1:]):
            raise CheckpointError(
                f"{self._path}: {module} has factors of shapes {list(a)} and {list(b)}, which "
                f"cannot be multiplied; {_REMEDY}."
            )
        turned = embedding or self._settings.fan_in_fan_out
        product = (a[1], b[0]) if turned else (b[0], *a[1:])
        spec = self._base.spec(name)
        self._check_untied(name)
        if product != spec.shape or (turned and len(a) > 2):
            raise CheckpointError(
                f"{self._path}: the factors of {module} give a change of shape {list(product)} "
                f"(fan_in_fan_out: {self._settings.fan_in_fan_out}), but the base's tensor has "
                f"{list(spec.shape)}; name the base that the adapter was trained on, unquantised."
            )
        if not is_mergeable(spec.dtype):
            raise CheckpointError(
                f"{self._base.path}: {name} is {spec.dtype}, to which {self._path} cannot be "
                "added; give the unquantised base."
            )
        magnitude = keys.get("lora_magnitude_vector")
        self._check_magnitude(module, spec, magnitude, turned)
        return replace(
            change, left=left, right=right, turned=turned, magnitude=magnitude,
            scaling=self._settings.scaling(module, a[0]),
        )  # fmt: skip

    def _check_magnitude(
        self, module: str, spec: TensorSpec, key: str | None, turned: bool
    ) -> None:
        if self._settings.dora != (key is not None):
            raise CheckpointError(
                f"{self._settings.path} says use_dora = {self._settings.dora}, but {module} has "
                f"{'a' if key is not None else 'no'} lora_magnitude_vector; {_REMEDY}."
            )
        if key is None:
            return
        if turned or len(spec.shape) != 2 or self._adapter.specs[key].numel != spec.shape[0]:
            raise CheckpointError(
                f"{self._path}: DoRA (use_dora) of {module} is not supported, only that of linear "
                "layers is; fold the adapter into its base with peft (merge_and_unload) first."
            )

    def _add_bias(self, name: str, key: str, scaling: float, changes: dict[str, Change]) -> None:
        """Note the vector of `lora_bias`, which is added to the module's own bias."""
        spec = self._adapter.specs[key]
        if name not in self._base or self._base.spec(name).shape != spec.shape:
            raise CheckpointError(
                f"{self._path}: {key!r} (lora_bias) is added to {name}, which the base "
                f"{self._base.path} lacks or has in another shape; it cannot be merged."
            )
        changes[name] = replace(changes.get(name, Change()), added=key, scaling=scaling)

    def _check_untied(self, name: str) -> None:
        if is_tied(name, self._base):
            raise CheckpointError(
                f"{self._path} changes {name}, which the base uses both as embedding and as "
                "output layer, only in one of these places; save the base untied "
                "(tie_word_embeddings: false) first."
            )


def is_tied(name: str, base: Checkpoint) -> bool:
    """Return whether two layers share a tensor: PEFT would change, and so untie, one of them.

    Files say so by tied names; else a language model with a single matrix of `vocab_size` rows is
    taken to be tied unless its configuration says no.
    """
    if name in base.aliases or name in base.aliases.values():
        return True
    config = base.config or {}
    rows = config.get("vocab_size")
    if rows is None or base.spec(name).shape[:1] != (rows,):
        return False
    matrices = [s for s in base.specs.values() if len(s.shape) == 2 and s.shape[0] == rows]
    classes = cast("list[object]", config.get("architectures") or [])
    said = config.get("tie_word_embeddings")
    may = any(_GENERATES.search(str(each)) for each in classes) if classes else said is True
    return len(matrices) == 1 and may and said is not False


class _Renaming:
    """Names of modules as an adapter has them to names of tensors as the base has them."""

    def __init__(self, dropped: str, added: str) -> None:
        self._dropped, self._added = dropped, added

    def __call__(self, name: str) -> str:
        return self._added + name.removeprefix(self._dropped)


def _renaming(names: Iterable[str], base: Checkpoint, path: Path) -> _Renaming:
    """Return the one change of prefix under which the base has all names.

    A base may be stored with or without the prefix of the class that it was trained in, such as
    `transformer.` or `bert.`.

    Raises:
        CheckpointError: there is none, or there are two.
    """
    wanted = list(names)
    first = wanted[0]
    parts = first.split(".")
    cuts = [".".join(parts[:i]) + "." if i else "" for i in range(len(parts) - 1)]
    known = {*base.specs, *base.aliases}
    longer = sorted(name[: -len(first)] for name in known if name.endswith(f".{first}"))
    ways = [_Renaming(cut, "") for cut in cuts] + [_Renaming("", more) for more in longer]
    fitting = [way for way in ways if all(way(name) in known for name in wanted)]
    if fitting and (fitting[0](first) == first or len(fitting) == 1):
        return fitting[0]
    missing = next((name for name in wanted if name not in known), first)
    if fitting:
        raise CheckpointError(
            f"{path}: {missing!r} could be any of "
            f"{', '.join(way(missing) for way in fitting[:3])} of {base.path}; name the base that "
            "the adapter was trained on."
        )
    raise CheckpointError(
        f"{path}: the base {base.path} has no tensor {missing!r}, which the adapter changes; name "
        "the base that the adapter was trained on."
    )
