"""Whether models read and write the same tokens: a refusal that names them, and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergewell.errors import PlanError
from mergewell.tokenizers.vocabulary import Vocabulary

_NAMED = 3


def require_same(
    reference: Vocabulary | None, others: Sequence[tuple[Path, Vocabulary | None]]
) -> list[str]:
    """Return warnings about tokens that only some experts have, templates and special tokens.

    Raises:
        PlanError: a number stands for different tokens, or a token has different numbers.
    """
    if reference is None:
        return []
    warnings: list[str] = []
    for path, other in others:
        if other is None or other is reference:
            continue
        changed = conflicts(reference, other)
        if changed:
            raise PlanError(
                f"{path}: {len(changed)} of its tokens are not those of {reference.folder} "
                f"({_list(changed)}), so rows of the embeddings would be mixed up; choose a "
                "vocabulary with `tokenizer: {source: base}`, union or a folder in the recipe."
            )
        warnings += _only_in(path, reference, other)
        warnings += other_uses(path, reference, other)
    return warnings


def refuse_other_rows(
    path: Path, rows: int, due: int, *, reference: Vocabulary, other: Vocabulary
) -> None:
    """Raise PlanError, which names the tokens, where embeddings have rows for other tokens."""
    more = [repr(token) for token in other.numbers if token not in reference.numbers]
    fewer = [repr(token) for token in reference.numbers if token not in other.numbers]
    parts = [
        f"{len(tokens)} tokens that only {owner} has ({_list(tokens)})"
        for tokens, owner in [(more, "it"), (fewer, str(reference.folder))]
        if tokens
    ]
    said = f", with {' and '.join(parts)}" if parts else ""
    raise PlanError(
        f"{path}: its embeddings have {rows} rows{said}, but those of {reference.folder} {due}; "
        "choose a vocabulary with `tokenizer: {source: union}`, base or a folder in the recipe."
    )


def conflicts(reference: Vocabulary, other: Vocabulary) -> list[str]:
    """Return sentences' parts on what has one number in one vocabulary and another in the other."""
    if reference.numbers == other.numbers:
        return []
    tokens = {number: token for token, number in reference.numbers.items()}
    found: list[tuple[int, str]] = []
    for token, number in other.numbers.items():
        due, there = reference.numbers.get(token), tokens.get(number)
        if due is not None and due != number:
            found.append((number, f"{token!r} is {number} here and {due} there"))
        elif due is None and there is not None:
            found.append((number, f"{number} is {token!r} here and {there!r} there"))
    return [text for _, text in sorted(found)]


def other_uses(path: Path, reference: Vocabulary, other: Vocabulary) -> list[str]:
    """Return warnings about a model that plays its tokens otherwise: templates, special tokens."""
    warnings: list[str] = []
    if other.template is not None and other.template != reference.template:
        has = "another" if reference.template is not None else "no"
        warnings.append(
            f"{path} was trained with a chat template; {reference.folder} has {has} one, which is "
            "kept: choose with `tokenizer: {chat_template: ...}`."
        )
    for part in sorted(reference.special.keys() & other.special.keys()):
        if reference.special[part] != other.special[part]:
            warnings.append(
                f"{path}: {part} is {other.special[part]!r}, but {reference.special[part]!r} in "
                f"{reference.folder}, which is kept."
            )
    return warnings


def _only_in(path: Path, reference: Vocabulary, other: Vocabulary) -> list[str]:
    more = [token for token in other.numbers if token not in reference.numbers]
    if not more:
        return []
    return [
        f"{path} has {len(more)} tokens that {reference.folder} lacks "
        f"({_list([repr(token) for token in more])}), and so will the result; "
        "`tokenizer: {source: union}` keeps them."
    ]


def _list(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + more
