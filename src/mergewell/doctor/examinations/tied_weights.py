"""Embeddings and output head: tied in some models and not in others."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mergewell.doctor.examinations.base import Examination, Trouble
from mergewell.doctor.patient import Model, Patient

_IN = ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight")
_OUT = ("lm_head.weight", "embed_out.weight", "decoder.weight")


class TiedWeights(Examination):
    """An output head that config.json ties to the embeddings, stored with other numbers."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield each model whose head and embeddings contradict its `config.json`."""
        for model in patient.models:
            pair = _tables(model)
            if (model.checkpoint.config or {}).get("tie_word_embeddings") is not True:
                continue
            if pair is None or torch.equal(*(model.checkpoint[name] for name in pair)):
                continue
            what = (
                "give the recipe one rule for both and merge again"
                if model is patient.merged
                else "drop the head by a rule {match: '" + pair[1] + "', omit: true}, or set "
                "tie_word_embeddings to false"
            )
            yield Trouble(
                "damage",
                f"{model.name}: config.json ties {pair[1]} to {pair[0]}, but they hold different "
                f"numbers, one of which loading throws away; {what}.",
                model.name,
                pair,
            )


def _tables(model: Model) -> tuple[str, str] | None:
    """Return the embeddings and the head, where they stand in the files each by itself."""
    specs = model.checkpoint.specs
    ins = [name for name in specs if name.endswith(_IN)]
    outs = [name for name in specs if name.endswith(_OUT) and len(specs[name].shape) == 2]
    for first in ins:
        for second in outs:
            if specs[first].shape == specs[second].shape:
                return first, second
    return None
