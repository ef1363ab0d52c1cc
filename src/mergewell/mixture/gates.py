"""Gates: one row an expert for every layer, from prompts or at random.

Source: mergekit 0.1.4, `docs/moe.md`, by its description and behaviour.
Departures: the last token of a prompt is its own last one, not padding; negative prompts are
normalised as positive ones are; random numbers come from a seed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mergewell.errors import ModelError, PlanError
from mergewell.mixture.choice import Mixture
from mergewell.models.loader import ModuleSource, load_state
from mergewell.storage.base import Checkpoint

_EMBEDDINGS = "model.embed_tokens.weight"


def make_gates(mixture: Mixture, base: Checkpoint, layers: int, width: int) -> Tensor:
    """Return the gates [layers, experts, width] in float32: of routed experts, then of shared.

    Raises:
        ModelError: transformers is missing, or has no tokenizer or architecture for the base.
        PlanError: prompts that give an expert no direction.
    """
    shape = (layers, len(mixture.all_experts), width)
    generator = torch.Generator().manual_seed(mixture.seed)
    if mixture.gate == "random":
        return torch.randn(shape, generator=generator)
    if mixture.gate == "uniform_random":
        return (2 * torch.rand(shape, generator=generator) - 1) * width**-0.5
    tokenizer = _tokenizer(base.path)
    if mixture.gate == "cheap_embed":
        states = _Embedded(base, layers)
    else:
        states = _Hidden(base, average=mixture.gate == "hidden_avg")
    rows: list[Tensor] = []
    for expert in mixture.all_experts:
        row = states.of(_tokens(tokenizer, expert.prompts))
        if expert.negative_prompts:
            row = _unit(row) - _unit(states.of(_tokens(tokenizer, expert.negative_prompts)))
        if not bool(row.any(dim=1).all()):
            raise PlanError(
                f"{expert.path}: its prompts and negative prompts cancel; give others for gate "
                f"{mixture.gate}."
            )
        rows.append(_unit(row))
    return torch.stack(rows, dim=1)


class _Embedded:
    """Sums of the embeddings of tokens, the same for all layers."""

    def __init__(self, base: Checkpoint, layers: int) -> None:
        self._base, self._layers = base, layers

    def of(self, prompts: Sequence[list[int]]) -> Tensor:
        """Return [layers, width]."""
        width = self._base.spec(_EMBEDDINGS).shape[1]
        tokens = [token for prompt in prompts for token in prompt]
        rows = [self._base.read(_EMBEDDINGS, t * width, (t + 1) * width).float() for t in tokens]
        return torch.stack(rows).sum(0).expand(self._layers, width)


class _Hidden:
    """Hidden states of the base before each layer."""

    def __init__(self, base: Checkpoint, *, average: bool) -> None:
        self._module: Any = ModuleSource.parse(base.path).build()
        load_state(self._module, base)
        self._average = average

    def of(self, prompts: Sequence[list[int]]) -> Tensor:
        """Return [layers, width], the mean over prompts."""
        found: list[Tensor] = []
        for prompt in prompts:
            with torch.no_grad():
                output = self._module(
                    input_ids=torch.tensor([prompt]), output_hidden_states=True, use_cache=False
                )
            states = torch.stack([state[0] for state in output.hidden_states[:-1]])
            found.append(states.mean(1) if self._average else states[:, -1])
        return torch.stack(found).mean(0)


def _unit(rows: Tensor) -> Tensor:
    return functional.normalize(rows, dim=-1, eps=1e-8)


def _tokens(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    begin = tokenizer.bos_token or ""
    found = [tokenizer(begin + text, add_special_tokens=False)["input_ids"] for text in prompts]
    for text, tokens in zip(prompts, found, strict=True):
        if not tokens:
            raise PlanError(f"The prompt {text!r} has no tokens; give a text.")
    return found


def _tokenizer(folder: Path) -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            "Prompts need transformers, which is not installed: pip install 'mergewell[models]'."
        ) from error
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ModelError(
            f"{folder} holds no tokenizer that transformers can load ({reason}); add its files, or "
            "choose gate: random."
        ) from error
