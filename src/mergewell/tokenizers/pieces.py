"""Pieces: how a model's own tokenizer cuts the text of a token that it does not have."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergewell.errors import PlanError
from mergewell.tokenizers.vocabulary import FAST, Vocabulary


class Pieces:
    """The text of a donor's tokens, cut by the tokenizers of the models.

    Source: mergekit, `docs/tokensurgeon.md`, the approximation `subword` with the mean.
    """

    def __init__(self, donor: Vocabulary, models: Sequence[Vocabulary]) -> None:
        """Load the tokenizers.

        Raises:
            PlanError: the library tokenizers is missing, or one has no `tokenizer.json`.
        """
        self._numbers = donor.numbers
        self._donor = _loaded(_fast(donor))
        self._models = [_loaded(_fast(model)) for model in models]

    def of(self, token: str, model: int) -> tuple[int, ...]:
        """Return the numbers of the pieces of a token in a model; none where nothing is left."""
        text: str = self._donor.decode([self._numbers[token]], skip_special_tokens=False)
        if not text:
            return ()
        return tuple(self._models[model].encode(text, add_special_tokens=False).ids)


def _fast(vocabulary: Vocabulary) -> Path:
    path = vocabulary.file(FAST)
    if path is None:
        raise PlanError(
            f"{vocabulary.folder} has no {FAST}, which `missing: pieces` needs; save its tokenizer "
            "as a fast one, or choose missing: mean."
        )
    return path


def _loaded(path: Path) -> Any:
    try:
        library: Any = importlib.import_module("tokenizers")
    except ImportError as error:
        raise PlanError(
            "`missing: pieces` needs tokenizers, which is not installed: "
            "pip install 'mergewell[models]'."
        ) from error
    try:
        return library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise PlanError(f"{path} cannot be loaded ({error}); choose missing: mean.") from error
