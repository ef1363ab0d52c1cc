"""Rows: which row of whose embeddings fills each row of each model's, under a joint vocabulary.

Source: the rules of mergekit 0.1.4 (`tokenizer_source`), by its documentation and behaviour: a
model's own row for a token that it has; else that of the only model that has it, or of the base,
or the mean of those that have it; zeros for a token that no model has.
Departures: rows of no token (padding to a round number) are kept where the source has them; the
mean of all a model's rows is offered for tokens that no model has, as for padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mergewell.errors import PlanError, did_you_mean
from mergewell.tokenizers.choice import TokenizerChoice, TokenSource
from mergewell.tokenizers.pieces import Pieces

MEAN: tuple[tuple[int, int], ...] = ((-1, -1),)
"""Stands for the mean of all rows of a model's own table."""

Origin = tuple[tuple[int, int], ...]
"""(model, row) of the rows whose mean is taken; none is zeros."""


@dataclass(frozen=True, slots=True)
class Member:
    """A model of the merge as its rows are looked for."""

    path: Path
    numbers: Mapping[str, int]
    rows: int
    """Rows of its embeddings."""

    def row(self, token: str) -> int:
        """Return the row of a token; -1 where it has none, or one beyond the embeddings."""
        number = self.numbers.get(token, -1)
        return number if number < self.rows else -1


@dataclass(frozen=True, slots=True)
class Rows:
    """What fills one model's table of the joint vocabulary."""

    own: NDArray[np.int64]
    """[V] the model's own row, or -1."""

    others: Mapping[int, Origin]
    """Of each row without an own one, where it comes from."""


def find_rows(
    members: Sequence[Member],
    numbers: Mapping[str, int],
    rows: int,
    *,
    choice: TokenizerChoice,
    like: int | None,
    pieces: Pieces | None = None,
) -> tuple[list[Rows], list[str]]:
    """Return what fills the tables of `rows` rows of each model, and warnings.

    `numbers` is the joint vocabulary, `members` the reference and then the experts; rows of no
    token are those of member `like`, where that has as many. `pieces` cuts tokens that none has.

    Raises:
        PlanError: a token of the recipe is not in the vocabulary, or not in the model it names.
    """
    for token in choice.tokens:
        if token not in numbers:
            raise PlanError(
                f"tokenizer.tokens: {token!r} is in no vocabulary of the result; add it to a "
                "tokenizer, or drop it."
            )
    own = [np.full(rows, -1, dtype=np.int64) for _ in members]
    others: list[dict[int, Origin]] = [{} for _ in members]
    strangers: list[str] = []
    for token, number in numbers.items():
        found = [member.row(token) for member in members]
        source = choice.tokens.get(token)
        if source is None and min(found) >= 0:
            for index, row in enumerate(found):
                own[index][number] = row
            continue
        if source is not None:
            origin = _named(source, token, members)
        else:
            origin = _usual(found)
            if not origin:
                strangers.append(token)
                origin = MEAN if choice.missing == "mean" else ()
                if pieces is not None:
                    for index, member in enumerate(members):
                        cut = [row for row in pieces.of(token, index) if row < member.rows]
                        others[index][number] = tuple((index, row) for row in cut)
                    continue
        forced = source is not None and source.force
        for index, row in enumerate(found):
            if row >= 0 and not forced:
                own[index][number] = row
            else:
                others[index][number] = origin
    _fill_nameless(members, numbers, own, others, like)
    filled = {"mean": "the mean of all", "zero": "zeros", "pieces": "the means of their pieces"}
    warnings = [
        f"{len(strangers)} tokens of the result are in no model that is merged (such as "
        f"{strangers[0]!r}); their embeddings are {filled[choice.missing]}."
    ] if strangers else []  # fmt: skip
    return [Rows(o, rest) for o, rest in zip(own, others, strict=True)], warnings


def _usual(found: Sequence[int]) -> Origin:
    """Return where a token's row comes from in models that lack it; nothing if all do."""
    having = [(index, row) for index, row in enumerate(found) if row >= 0]
    return tuple(having[:1] if found[0] >= 0 else having)


def _named(source: TokenSource, token: str, members: Sequence[Member]) -> Origin:
    if source.model is None:
        return ()
    where = Path(source.model).resolve()
    index = next((i for i, m in enumerate(members) if m.path.resolve() == where), None)
    if index is None:
        raise PlanError(
            f"tokenizer.tokens: {token!r} is to come from {source.model}, which is not merged; "
            f"{did_you_mean(source.model, [str(m.path) for m in members])}"
        )
    member, wanted = members[index], source.token if source.token is not None else token
    row = source.id if source.id is not None else member.row(wanted)
    if not 0 <= row < member.rows:
        raise PlanError(
            f"tokenizer.tokens: {token!r} is to come from {source.model}, which has no "
            f"{f'row {row}' if source.id is not None else repr(wanted)}; name another."
        )
    return ((index, row),)


def _fill_nameless(
    members: Sequence[Member],
    numbers: Mapping[str, int],
    own: Sequence[NDArray[np.int64]],
    others: Sequence[dict[int, Origin]],
    like: int | None,
) -> None:
    """Fill rows of no token: with those of the source, where it has them, else with the mean."""
    nameless = sorted({*range(len(own[0]))} - {*numbers.values()})
    taken = [{*member.numbers.values()} for member in members] if nameless else []
    for number in nameless:
        has = like is not None and number < members[like].rows
        for index, member in enumerate(members):
            if has and number < member.rows and number not in taken[index]:
                own[index][number] = number
            elif has and like is not None:
                others[index][number] = ((like, number),)
            else:
                others[index][number] = MEAN
