"""Perplexity of texts under causal language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mergewell.errors import DataError, ModelError
from mergewell.evaluation.base import Measure, Rows
from mergewell.labelled import first_output
from mergewell.models.dataflow import Batch, call, evaluating


def perplexity_on(task: str, batches: Sequence[Batch], *, expert: int | None = None) -> Measure:
    """Return the measure of the perplexity of tokenised texts: exp of the mean loss a token.

    Batches hold `input_ids` [n, T] and, if there is padding, `attention_mask`. The interval is over
    texts, each with all its tokens.

    Raises:
        DataError: no text, or batches without `input_ids`.
    """
    for batch in batches or [{}]:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise DataError(f"{task} holds no tokens to be read one after the other; give texts.")

    def rows(module: nn.Module) -> Rows:
        found: list[Tensor] = []
        with evaluating([module]):
            for batch in batches:
                assert isinstance(batch, Mapping)
                found.append(_losses(module, batch))
        return np.asarray(torch.cat(found, dim=1).numpy())

    return Measure(task, "perplexity", rows, higher=False, exponential=True, expert=expert)


def _losses(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the summed loss of each text and how many tokens it counts, [2, n]."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    logits = first_output(module, call(module, {"input_ids": ids, "attention_mask": mask}))
    if logits.shape[:2] != ids.shape or logits.dim() != 3 or logits.shape[-1] <= int(ids.max()):
        raise ModelError(
            f"{type(module).__name__} gives {tuple(logits.shape)} for {tuple(ids.shape)} tokens; "
            "perplexity needs the logits of a causal language model."
        )
    losses = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none"
    )
    counted = (mask[:, 1:] * mask[:, :-1]).double()
    return torch.stack([(losses.double() * counted).sum(1), counted.sum(1)])
