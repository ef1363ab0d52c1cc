"""A mergekit configuration as checked data: what is not understood is refused by its name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mergewell.errors import RecipeError, did_you_mean
from mergewell.mergekit.methods import PEERS, Peer
from mergewell.mergekit.tokenizer import tokenizer_choice
from mergewell.storage.folder import is_there

_KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name", "out_path",
)  # fmt: skip
_REFUSED = {
    "base_layer_range": "name the range as a source of the slice",
}
_WHOLE = "default"
"""What mergekit calls the only module of an architecture that has one."""
_LARGEST = 1e30  # far beyond any use, and no product of two of them overflows
_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Gradient:
    """Numbers at equal distances, interpolated linearly over the layers."""

    values: tuple[float, ...]

    def at(self, t: float) -> float:
        """Return the value at the place `t` in [0, 1]."""
        place = t * (len(self.values) - 1)
        low = int(place)
        high = min(len(self.values) - 1, low + 1)
        return (1 - (place - low)) * self.values[low] + (place - low) * self.values[high]


@dataclass(frozen=True, slots=True)
class Conditional:
    """A value for the tensors whose names contain `filter`; None means all."""

    filter: str | None
    value: float | Gradient


Setting = float | Gradient | tuple[Conditional, ...]
"""A number, a gradient, or values by filter."""

Parameters = Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Source:
    """A model, or layers [start, stop) of it, in a slice."""

    model: str
    layers: tuple[int, int] | None
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of the result and the models that they are merged from."""

    sources: tuple[Source, ...]
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration; `models` is one slice of whole models."""

    method: str
    peer: Peer
    slices: tuple[Slice, ...]
    base_model: str | None
    parameters: Parameters
    dtype: str | None
    tokenizer: Mapping[str, Any]
    """What the recipe says of tokenizers; nothing if the configuration does not."""

    def settings(self) -> tuple[Setting, ...]:
        """Return every parameter's setting, in the order of precedence."""
        scopes = [s.parameters for piece in self.slices for s in piece.sources]
        scopes += [piece.parameters for piece in self.slices] + [self.parameters]
        return tuple(setting for scope in scopes for setting in scope.values())

    def filters(self) -> tuple[str, ...]:
        """Return every filter, in the order of the configuration."""
        found = (c.filter for s in self.settings() if isinstance(s, tuple) for c in s)
        return tuple(dict.fromkeys(text for text in found if text not in (None, "*")))

    def has_gradient(self) -> bool:
        """Return True if a parameter depends on the layer."""
        return any(
            isinstance(value, Gradient)
            for setting in self.settings()
            for value in ([c.value for c in setting] if isinstance(setting, tuple) else [setting])
        )


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Return True for the contents of a mergekit configuration rather than of a recipe."""
    shapes = {"models", "slices", "modules"}
    return "merge_method" in data or ("experts" not in data and not shapes.isdisjoint(data))


def evaluate(setting: Setting, name: str, t: float) -> float | None:
    """Return a setting's value for a tensor, at the place `t` in [0, 1] of its layer.

    Of conditional values the first whose filter is part of the name counts; None if none is.
    """
    if isinstance(setting, Gradient):
        return setting.at(t)
    if not isinstance(setting, tuple):
        return setting
    for condition in setting:
        if condition.filter is None or condition.filter == "*" or condition.filter in name:
            return evaluate(condition.value, name, t)
    return None


def stage_names(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names that other configurations may give this one's result."""
    return tuple(str(data[key]) for key in ("name", "out_path") if data.get(key) is not None)


def read_config(
    data: Mapping[str, Any], *, where: str, base_dir: Path, stages: Collection[str] = ()
) -> Config:
    """Return the checked configuration; `stages` are models that others of it make.

    Raises:
        RecipeError: a key, parameter or value that is not understood or not supported.
    """
    for key, reason in _REFUSED.items():
        if data.get(key) is not None:
            raise RecipeError(f"{where}: {key}: {reason}.")
    data = _of_one_module(data, where)
    _check_keys(data, _KEYS, where)
    method = data.get("merge_method")
    if not isinstance(method, str):
        raise RecipeError(f"{where}: merge_method is missing; name one of {', '.join(PEERS)}.")
    if method not in PEERS:
        raise RecipeError(
            f"{where}: merge_method {method!r} is not known, {did_you_mean(method, PEERS)}"
        )
    reader = _Reader(where, base_dir, method, PEERS[method], stages)
    base = data.get("base_model")
    for key in ("dtype", "out_dtype"):
        reader.dtype({key: data.get(key)})
    return Config(
        method=method,
        peer=PEERS[method],
        slices=reader.slices(data),
        base_model=reader.model(base, "base_model") if base is not None else None,
        parameters=reader.parameters(data.get("parameters"), "parameters"),
        dtype=reader.dtype(data),
        tokenizer=tokenizer_choice(data, where=where, model=reader.model),
    )


def _of_one_module(data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a configuration whose `modules` are the only one, `default`, without that level."""
    modules: object = data.get("modules")
    if modules is None:
        return data
    if not isinstance(modules, dict) or list(cast("dict[str, Any]", modules)) != [_WHOLE]:
        named = ", ".join(map(str, cast("dict[str, Any]", modules) if modules else ()))
        raise RecipeError(
            f"{where}: modules: only `{_WHOLE}`, the whole model, is supported, but not {named}; "
            "give `models`, and a parameter by `filter` where modules differ."
        )
    whole: object = cast("dict[str, Any]", modules)[_WHOLE]
    if not isinstance(whole, dict):
        raise RecipeError(f"{where}: modules.{_WHOLE} is a mapping with `models` or `slices`.")
    inner = cast("dict[str, Any]", whole)
    _check_keys(inner, ("models", "slices"), f"{where}: modules.{_WHOLE}")
    if "models" in data or "slices" in data:
        raise RecipeError(f"{where}: give `modules`, `models` or `slices`, and not two of them.")
    return {**{key: value for key, value in data.items() if key != "modules"}, **inner}


@dataclass(frozen=True, slots=True)
class _Reader:
    where: str
    base_dir: Path
    method: str
    peer: Peer
    stages: Collection[str]

    def slices(self, data: Mapping[str, Any]) -> tuple[Slice, ...]:
        """Return the slices; whole models are one."""
        models, slices = data.get("models"), data.get("slices")
        if (models is None) == (slices is None):
            raise RecipeError(f"{self.where}: give either `models` or `slices`.")
        if models is not None:
            entries = self._list(models, "models")
            sources = [self._source(e, f"models.{i}", ()) for i, e in enumerate(entries)]
            return (Slice(tuple(sources), {}),)
        return tuple(
            self._slice(entry, f"slices.{i}")
            for i, entry in enumerate(self._list(slices, "slices"))
        )

    def _slice(self, entry: object, place: str) -> Slice:
        found = self._mapping(entry, place, ("sources", "parameters"))
        sources = [
            self._source(source, f"{place}.sources.{i}", ("layer_range",))
            for i, source in enumerate(self._list(found.get("sources"), f"{place}.sources"))
        ]
        lengths = [stop - start for start, stop in (s.layers for s in sources if s.layers)]
        if len(set(lengths)) > 1:
            raise RecipeError(
                f"{self.where}: {place}: the layer ranges have {lengths} layers; give ranges of "
                "one length."
            )
        return Slice(
            tuple(sources), self.parameters(found.get("parameters"), f"{place}.parameters")
        )

    def _source(self, entry: object, place: str, more: tuple[str, ...]) -> Source:
        found = self._mapping(entry, place, ("model", "parameters", *more))
        if found.get("model") is None:
            raise RecipeError(f"{self.where}: {place}: `model` is missing; name a folder.")
        return Source(
            self.model(found["model"], f"{place}.model"),
            self._range(found.get("layer_range"), place) if more else None,
            self.parameters(found.get("parameters"), f"{place}.parameters", of_model=True),
        )

    def _range(self, value: object, place: str) -> tuple[int, int]:
        numbers = cast("list[object]", value) if isinstance(value, list) else []
        ends = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool)]
        if len(numbers) != 2 or len(ends) != 2 or not 0 <= ends[0] < ends[1]:
            raise RecipeError(
                f"{self.where}: {place}: layer_range = {value!r} is refused; write it as "
                "[first, after the last], such as [0, 16]."
            )
        return ends[0], ends[1]

    def model(self, value: object, place: str) -> str:
        """Return a model's path, or `MODEL+ADAPTER`; a path beside the configuration from here."""
        if isinstance(value, dict):
            found = self._mapping(
                cast("object", value), place, ("model", "lora", "path", "revision")
            )
            inner: object = found.get("model", found if "path" in found else None)
            if isinstance(inner, dict) and "path" in inner:
                named = self._mapping(cast("object", inner), place, ("path", "revision"))
                revision = named.get("revision")
                inner = named["path"] if revision is None else f"{named['path']}@{revision}"
            path = self.model(cast("object", inner), place)
            lora: object = found.get("lora")
            return path if lora is None else f"{path}+{self.model(lora, f'{place}.lora')}"
        if not isinstance(value, str) or not value:
            raise RecipeError(f"{self.where}: {place} = {value!r} is no path; name a folder.")
        there = self.base_dir / value
        if value in self.stages or Path(value).is_absolute():
            return value
        if is_there(there):
            return str(there)
        if "+" in value and not is_there(Path(value)):
            return "+".join(self.model(part, place) for part in value.split("+"))
        return value

    def parameters(self, value: object, place: str, *, of_model: bool = False) -> Parameters:
        """Return parameters by name, after a look at whether the method has them there."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise RecipeError(f"{self.where}: {place} is a mapping from names to values.")
        entries = cast("dict[str, object]", value)
        known = [*self.peer.each, *(() if of_model else self.peer.shared)]
        for name in entries:
            if of_model and name in self.peer.shared:
                raise RecipeError(
                    f"{self.where}: {place}.{name} is one for all models of {self.method}; move it "
                    "to `parameters`."
                )
            if name not in known:
                advice = did_you_mean(str(name), known) if known else "it takes none here."
                raise RecipeError(
                    f"{self.where}: {place}: {self.method} has no parameter {name!r}, {advice}"
                )
        return {name: self._setting(entry, f"{place}.{name}") for name, entry in entries.items()}

    def _setting(self, value: object, place: str) -> Setting:
        if not isinstance(value, list) or not value:
            return self._number(cast("object", value), place)
        entries = cast("list[object]", value)
        if all(isinstance(entry, dict) for entry in entries):
            return tuple(self._conditional(entry, place) for entry in entries)
        return Gradient(tuple(self._number(entry, place) for entry in entries))

    def _conditional(self, entry: object, place: str) -> Conditional:
        found = self._mapping(entry, place, ("filter", "value"))
        pattern = found.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            raise RecipeError(f"{self.where}: {place}: filter = {pattern!r} is no text.")
        value = self._setting(found.get("value"), place)
        if isinstance(value, tuple):
            raise RecipeError(f"{self.where}: {place}: a filter's value has filters; flatten them.")
        return Conditional(pattern, value)

    def _number(self, value: object, place: str) -> float:
        if isinstance(value, bool):
            return float(value)
        if isinstance(value, int | float) and abs(value) <= _LARGEST:
            return value
        raise RecipeError(
            f"{self.where}: {place} = {value!r} is refused; give a number, a list of numbers, or a "
            "list of {filter, value}."
        )

    def dtype(self, data: Mapping[str, Any]) -> str | None:
        """Return the dtype of the result: `out_dtype`, or else `dtype`."""
        for key in ("out_dtype", "dtype"):
            value = data.get(key)
            if value is not None:
                if value not in _DTYPES:
                    raise RecipeError(
                        f"{self.where}: {key} = {value!r} is not known, "
                        f"{did_you_mean(str(value), _DTYPES)}"
                    )
                return value
        return None

    def _list(self, value: object, place: str) -> list[object]:
        if not isinstance(value, list) or not value:
            raise RecipeError(f"{self.where}: {place} is a list that names at least one.")
        return cast("list[object]", value)

    def _mapping(self, value: object, place: str, known: Iterable[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise RecipeError(f"{self.where}: {place} = {value!r} is no mapping; mend it there.")
        found = cast("dict[str, Any]", value)
        _check_keys(found, known, f"{self.where}: {place}")
        return found


def _check_keys(data: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    names = tuple(known)
    for key in data:
        if key not in names:
            raise RecipeError(
                f"{where}: the key {key!r} is not known, {did_you_mean(str(key), names)}"
            )
