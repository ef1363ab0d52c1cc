"""Probe: what the experts and the result answer to a few inputs, in a handful of numbers.

Shapes: N inputs, P answers (one an input, or one a position), C classes or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.errors import ModelError
from mergewell.inputs import batches
from mergewell.models.dataflow import Batch, call, evaluating, tensors
from mergewell.models.loader import load_state

INPUTS = 32
"""Inputs that are tried."""

_BATCH = 8
_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model answers."""

    name: str
    finite: bool
    """Whether every output is a number."""

    entropy: float
    """Mean entropy of the answers as a fraction of log C: 1 knows nothing, 0 is certain."""

    commonest: float
    """Fraction of the inputs that get the most frequent answer."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What the models answer, the experts first and the result last."""

    answers: tuple[Answers, ...]
    inputs: int
    own: bool
    """Whether the inputs are the user's; otherwise they are random."""


def probe(
    models: Mapping[str, Mapping[str, Tensor]],
    factory: Callable[[], nn.Module],
    given: Batch | None,
    *,
    seed: int = 0,
) -> Probe:
    """Return what models, by name, answer to inputs that are given or else drawn at random.

    One module is made and every model's weights are put into it in turn.

    Raises:
        ModelError: no inputs can be drawn for the module, the weights do not fit, or it gives no
            logits.
        UserError: as the factory.
    """
    module = factory()
    used = given if given is not None else random_inputs(module, seed=seed)
    found: list[Answers] = []
    cut = list(batches(used, _BATCH))
    for name, state in models.items():
        load_state(module, state)
        found.append(_answers(name, [*_logits(module, cut)]))
    return Probe(tuple(found), INPUTS if given is None else _count(given), given is not None)


def random_inputs(module: nn.Module, *, seed: int) -> Batch:
    """Return random tokens or pixels for a module that says what it takes.

    Transformers models say it in their `config`, timm models in `default_cfg`.

    Raises:
        ModelError: it does not say.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = getattr(module, "config", None)
    main: object = getattr(module, "main_input_name", None)
    words: object = getattr(config, "vocab_size", None)
    if main == "input_ids" and isinstance(words, int):
        ids = torch.randint(words, (INPUTS, _TOKENS), generator=generator)
        more = {"decoder_input_ids": ids[:, :4]} if config.is_encoder_decoder else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    size: object = getattr(config, "image_size", None)
    if main == "pixel_values" and isinstance(size, int):
        shape = (INPUTS, int(getattr(config, "num_channels", 3)), size, size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    own: object = getattr(module, "default_cfg", None)
    if isinstance(own, Mapping) and "input_size" in own:
        return torch.randn((INPUTS, *own["input_size"]), generator=generator)  # pyright: ignore
    raise ModelError(
        f"{type(module).__name__} does not say what it takes; give a few inputs with --data."
    )


def _count(batch: Batch) -> int:
    return len(batch) if isinstance(batch, Tensor) else len(next(iter(batch.values())))


def _logits(module: nn.Module, cut: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield the logits of each batch, [p, C]; padding is left out."""
    with evaluating([module]):
        for batch in cut:
            output: Any = call(module, batch)
            logits: object = getattr(output, "logits", output)
            if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.shape[-1] < 2:
                kinds = ", ".join(type(t).__name__ for t in islice(tensors(output), 1)) or "none"
                raise ModelError(
                    f"{type(module).__name__} gives no logits (its first output: {kinds}), whose "
                    "entropy could be looked at; name a module with its head by --model-factory."
                )
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if mask is not None and mask.shape == logits.shape[:-1]:
                yield logits[mask.bool()].double()
            else:
                yield logits.flatten(0, -2).double()


def _answers(name: str, parts: Sequence[Tensor]) -> Answers:
    logits = torch.cat(list(parts))
    if not bool(logits.isfinite().all()):
        return Answers(name, finite=False, entropy=1.0, commonest=1.0)
    logs = logits.log_softmax(-1)
    entropy = float(-(logs.exp() * logs).sum(-1).mean()) / log(logits.shape[-1])
    counts = torch.bincount(logits.argmax(-1))
    return Answers(name, True, entropy, float(counts.max()) / len(logits))
