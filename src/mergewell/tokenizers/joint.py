"""The models of a merge under one vocabulary: theirs, if it is one, or the one that is chosen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergewell.errors import PlanError
from mergewell.storage.base import Checkpoint
from mergewell.storage.folder import find_side_files, is_there
from mergewell.storage.strict_json import read_object
from mergewell.tokenizers.choice import BASE, SAME, UNION, TokenizerChoice
from mergewell.tokenizers.differences import other_uses, refuse_other_rows, require_same
from mergewell.tokenizers.pieces import Pieces
from mergewell.tokenizers.rows import Member, Rows, find_rows
from mergewell.tokenizers.union import join
from mergewell.tokenizers.view import VocabularyView, tables_of
from mergewell.tokenizers.vocabulary import (
    SETTINGS,
    TEMPLATE,
    Vocabulary,
    is_of_tokenizer,
    read_vocabulary,
    tokenizer_files,
)


@dataclass(frozen=True, slots=True)
class Joint:
    """The models as they are merged."""

    models: tuple[Checkpoint, ...]
    warnings: tuple[str, ...]


def with_one_vocabulary(choice: TokenizerChoice | None, models: Sequence[Checkpoint]) -> Joint:
    """Return the models, reference first, with tables of the same rows for the same tokens.

    Without a choice, and under `same`, they come back as they are, after a look at their
    tokenizers; models without a tokenizer are taken to have the reference's.

    Raises:
        PlanError: different vocabularies without a choice, or a choice that cannot be made.
        CheckpointError: a damaged tokenizer.
    """
    found = _vocabularies(models)
    pairs = [(model.path, known) for model, known in zip(models, found, strict=True)][1:]
    if choice is None or choice.source == SAME:
        warnings = require_same(found[0], pairs)
        _require_rows(models, found)
        if choice is None or choice.chat_template is None or found[0] is None:
            return Joint(tuple(models), tuple(warnings))
        files = _with_template(dict.fromkeys(found[0].files), choice.chat_template, found)
        same = Rows(np.arange(next(iter(tables_of(models[0]).values()), 0)), {})
        return Joint((_view(models[0], same, models, {}, files), *models[1:]), tuple(warnings))
    reference = found[0]
    if not any(found) and not choice.is_path:
        doubt = f"No model has a tokenizer, so {choice.source} is their own: numbers are tokens."
        return Joint(tuple(models), (doubt,))
    if reference is None:
        raise PlanError(
            f"tokenizer: {choice.source}: {models[0].path} has no tokenizer to begin with; add its "
            "files, or drop `tokenizer`."
        )
    known = [vocabulary if vocabulary is not None else reference for vocabulary in found]
    members = [_member(model, one) for model, one in zip(models, known, strict=True)]
    numbers, files, like, warnings = _target(choice, models, known)
    uses = [w for path, one in pairs if one is not None for w in other_uses(path, reference, one)]
    rows = max(numbers.values(), default=-1) + 1
    if like is not None:
        rows = max(rows, members[like].rows)
    if (multiple := choice.pad_to_multiple_of) is not None:
        rows = -(-rows // multiple) * multiple
    pieces = Pieces(_of(numbers, files), known) if choice.missing == "pieces" else None
    filled, more = find_rows(members, numbers, rows, choice=choice, like=like, pieces=pieces)
    if choice.chat_template is not None:
        files, uses = _with_template(files, choice.chat_template, known), []
    tokens = {number: token for token, number in reference.numbers.items()}
    renumbered = {n: numbers[t] for n, t in tokens.items() if numbers.get(t, n) != n}
    return Joint(
        tuple(
            _view(model, own, models, renumbered, files)
            for model, own in zip(models, filled, strict=True)
        ),
        (*warnings, *more, *uses),
    )


def _require_rows(models: Sequence[Checkpoint], found: Sequence[Vocabulary | None]) -> None:
    due = next(iter(tables_of(models[0]).values()), None)
    for model, vocabulary in zip(models[1:], found[1:], strict=True):
        rows = next(iter(tables_of(model).values()), None)
        if None in (due, rows, found[0], vocabulary) or rows == due:
            continue
        assert due and rows and found[0] and vocabulary
        refuse_other_rows(model.path, rows, due, reference=found[0], other=vocabulary)


def _vocabularies(models: Sequence[Checkpoint]) -> list[Vocabulary | None]:
    first = read_vocabulary(tokenizer_files(models[0]))
    return [first, *(read_vocabulary(tokenizer_files(m), like=first) for m in models[1:])]


def _member(model: Checkpoint, vocabulary: Vocabulary) -> Member:
    tables = tables_of(model)
    if not tables:
        raise PlanError(
            f"{model.path} has no embeddings that are known by their names, such as "
            "model.embed_tokens.weight; drop `tokenizer` and merge models of one vocabulary."
        )
    return Member(model.path, vocabulary.numbers, next(iter(tables.values())))


def _target(
    choice: TokenizerChoice, models: Sequence[Checkpoint], known: Sequence[Vocabulary]
) -> tuple[Mapping[str, int], Mapping[Path, bytes | None], int | None, list[str]]:
    """Return the joint vocabulary, its files, the model whose it is if any, and warnings."""
    if choice.source == UNION:
        others = [(model.path, one) for model, one in zip(models, known, strict=True)][1:]
        joined = join(known[0], others)
        return joined.numbers, joined.files, 0, [*joined.warnings]
    if choice.source == BASE:
        return known[0].numbers, dict.fromkeys(known[0].files), 0, []
    folder = Path(choice.source)
    real = folder.resolve()
    like = next((i for i, model in enumerate(models) if model.path.resolve() == real), None)
    if like is not None:
        return known[like].numbers, dict.fromkeys(known[like].files), like, []
    files = tuple(file for file in find_side_files(folder) if is_of_tokenizer(file))
    donor = read_vocabulary(files) if is_there(folder) else None
    if donor is None:
        raise PlanError(
            f"tokenizer: {folder} is no folder with a tokenizer; name one, or same, base or union."
        )
    return donor.numbers, dict.fromkeys(donor.files), None, []


def _of(numbers: Mapping[str, int], files: Mapping[Path, bytes | None]) -> Vocabulary:
    paths = tuple(files)
    return Vocabulary(paths[0].parent, paths, numbers)


def _view(
    model: Checkpoint,
    rows: Rows,
    models: Sequence[Checkpoint],
    renumbered: Mapping[int, int],
    tokenizer: Mapping[Path, bytes | None],
) -> VocabularyView:
    side = {file: None for file in model.side_files if not is_of_tokenizer(file)}
    return VocabularyView(
        model,
        rows,
        members=models,
        renumbered=renumbered,
        side_files={**side, **tokenizer},
        files=tokenizer_files(model),
    )


def _with_template(
    files: Mapping[Path, bytes | None], wanted: str, known: Sequence[Vocabulary | None]
) -> dict[Path, bytes | None]:
    """Return a tokenizer's files with another chat template.

    Raises:
        PlanError: `auto`, but no model has a template; or a word that is no template.
    """
    template = wanted
    if wanted == "auto":
        counts = Counter(one.template for one in known if one is not None and one.template)
        if not counts:
            raise PlanError(
                "chat_template: auto takes what most models have, but none has one; give the text."
            )
        template = counts.most_common(1)[0][0]
    elif "{%" not in wanted and "{{" not in wanted:
        raise PlanError(
            f"chat_template: {wanted!r} is neither auto nor a template; give its text in Jinja, "
            "with {% or {{ in it."
        )
    result = {file: content for file, content in files.items() if file.name != TEMPLATE}
    for file, content in result.items():
        if file.name == SETTINGS:
            data = (
                json.loads(content) if content is not None else read_object(file, remedy="mend it")
            )
            data.pop("chat_template", None)
            result[file] = (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
    folder = next(iter(result)).parent
    return result | {folder / TEMPLATE: template.encode()}
