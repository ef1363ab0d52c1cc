"""Tokens: whether all models mean the same by a number, and have a row for each."""

from __future__ import annotations

from collections.abc import Iterator

from mergewell.doctor.examinations.base import Examination, Trouble, named
from mergewell.doctor.patient import Model, Patient
from mergewell.tokenizers.differences import conflicts
from mergewell.tokenizers.view import tables_of


class Vocabulary(Examination):
    """Tokenizers that number their tokens differently, and embeddings without a row for a token."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield each model with tokens of its own, and each with too few rows."""
        first = patient.reference
        chosen = patient.recipe is not None and patient.recipe.tokenizer is not None
        for model in patient.models:
            yield from _rows(model)
            if first is None or model is first or chosen:
                continue
            ours, theirs = first.vocabulary, model.vocabulary
            if ours is None or theirs is None:
                continue
            if differing := conflicts(ours, theirs):
                yield Trouble(
                    "garbage",
                    f"{model.name}: {len(differing)} of its tokens are not those of {first.name} "
                    f"({named(differing)}), so rows of the embeddings would be mixed up; choose "
                    "with `tokenizer: {source: union}` in the recipe.",
                    model.name,
                )
            elif more := [token for token in theirs.numbers if token not in ours.numbers]:
                yield Trouble(
                    "damage",
                    f"{model.name}: {len(more)} of its tokens are unknown to {first.name} "
                    f"({named([repr(token) for token in more])}) and would be lost; keep them with "
                    "`tokenizer: {source: union}` in the recipe.",
                    model.name,
                )


def _rows(model: Model) -> Iterator[Trouble]:
    if model.vocabulary is None:
        return
    for table, rows in tables_of(model.checkpoint).items():
        if rows < model.vocabulary.rows:
            late = [repr(t) for t, n in model.vocabulary.numbers.items() if n >= rows]
            yield Trouble(
                "garbage",
                f"{model.name}: {table} has {rows} rows but its tokenizer has tokens up to number "
                f"{model.vocabulary.rows - 1} ({named(late)}); take the tokenizer that belongs to "
                "these weights.",
                model.name,
                (table,),
            )
