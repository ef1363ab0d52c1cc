"""mergekit's words on tokenizers and chat templates, as a recipe says the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from mergewell.errors import RecipeError, did_you_mean

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template that mergekit calls chatml; OpenAI's format of messages, by its description."""

_KNOWN = ("alpaca", "chatml", "exaone", "llama3", "mistral")

OnModel = Callable[[object, str], str]
"""Returns the path of a model from what a configuration says of it, and where."""


def tokenizer_choice(data: Mapping[str, Any], *, where: str, model: OnModel) -> dict[str, Any]:
    """Return a recipe's `tokenizer` for `tokenizer_source`, `tokenizer` and `chat_template`.

    Raises:
        RecipeError: a key or a value that is not understood, by its name.
    """
    old, new = data.get("tokenizer_source"), data.get("tokenizer")
    if old is not None and new is not None:
        raise RecipeError(f"{where}: give one of tokenizer_source and tokenizer.")
    choice: dict[str, Any] = {}
    if old is not None:
        choice["source"] = _source(old, "tokenizer_source", model)
    if new is not None:
        found = _mapping(new, f"{where}: tokenizer", ("source", "tokens", "pad_to_multiple_of"))
        choice["source"] = _source(found.get("source") or "union", "tokenizer.source", model)
        if found.get("pad_to_multiple_of") is not None:
            choice["pad_to_multiple_of"] = found["pad_to_multiple_of"]
        tokens = cast("dict[str, Any]", found.get("tokens") or {})
        if not isinstance(cast("object", tokens), dict):
            raise RecipeError(f"{where}: tokenizer.tokens is a mapping from tokens to sources.")
        choice["tokens"] = {
            str(token): _token(about, f"{where}: tokenizer.tokens.{token}", model)
            for token, about in tokens.items()
        }
    if data.get("chat_template") is not None:
        choice["chat_template"] = _template(data["chat_template"], where)
    return choice


def _source(value: object, place: str, model: OnModel) -> str:
    if isinstance(value, str) and value in ("base", "union"):
        return value
    if isinstance(value, str):
        value = value.removeprefix("model:")
    return model(value, place)


def _token(about: object, where: str, model: OnModel) -> dict[str, Any]:
    found = _mapping(about, where, ("source", "force"))
    source: object = found.get("source")
    forced = {"force": found["force"]} if found.get("force") is not None else {}
    if source is None:
        raise RecipeError(f"{where}: `source` is missing; name a model, or {{kind: zero}}.")
    if not isinstance(source, dict) or "kind" not in source:
        return {"model": model(cast("object", source), where), **forced}
    inner = _mapping(cast("object", source), where, ("kind", "model", "token", "token_id"))
    if inner["kind"] == "zero":
        return forced
    if inner["kind"] != "model_token":
        kinds = ("model_token", "zero")
        raise RecipeError(f"{where}: kind: {did_you_mean(str(inner['kind']), kinds)}")
    which = {key: inner[old] for key, old in [("token", "token"), ("id", "token_id")]
             if inner.get(old) is not None}  # fmt: skip
    if len(which) != 1:
        raise RecipeError(f"{where}: give one of token and token_id.")
    return {"model": model(inner.get("model"), where), **which, **forced}


def _template(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"{where}: chat_template = {value!r} is no text.")
    if value == "chatml":
        return CHATML
    if value in _KNOWN:
        raise RecipeError(
            f"{where}: chat_template: {value} is a template of mergekit's that is not kept here; "
            "give its text, or chatml, or auto."
        )
    return value


def _mapping(value: object, where: str, known: Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{where} = {value!r} is no mapping; mend it there.")
    found, names = cast("dict[str, Any]", value), tuple(known)
    for key in found:
        if key not in names:
            raise RecipeError(
                f"{where}: the key {key!r} is not known, {did_you_mean(str(key), names)}"
            )
    return found
