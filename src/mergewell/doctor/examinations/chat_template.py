"""Chat templates and special tokens: whether the result is spoken to as its experts were."""

from __future__ import annotations

from collections.abc import Iterator

from mergewell.doctor.examinations.base import Examination, Trouble
from mergewell.doctor.patient import Patient


class ChatTemplate(Examination):
    """Models that were trained with another chat template or other special tokens."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield each expert that differs from the model whose tokenizer the result gets."""
        choice = patient.recipe.tokenizer if patient.recipe is not None else None
        first = patient.merged or patient.reference
        if first is None or first.vocabulary is None:
            return
        ours = first.vocabulary
        for model in patient.experts:
            theirs = model.vocabulary
            if theirs is None or model is first:
                continue
            settled = choice is not None and choice.chat_template is not None
            if theirs.template is not None and theirs.template != ours.template and not settled:
                has = "another" if ours.template is not None else "none"
                yield Trouble(
                    "damage",
                    f"{model.name}: it was trained with a chat template and {first.name} has {has},"
                    " so the result is not spoken to as this expert was; choose with "
                    "`tokenizer: {chat_template: ...}` in the recipe.",
                    model.name,
                )
            for part in sorted(ours.special.keys() & theirs.special.keys()):
                if ours.special[part] != theirs.special[part]:
                    yield Trouble(
                        "damage",
                        f"{model.name}: its {part} is {theirs.special[part]!r}, but "
                        f"{ours.special[part]!r} in {first.name}, so texts will begin or end "
                        "wrongly; agree on one in tokenizer_config.json.",
                        model.name,
                    )
