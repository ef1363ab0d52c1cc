"""Mixture: which models become the experts of a mixture, and how inputs find theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergewell.component import explain
from mergewell.errors import RecipeError
from mergewell.storage.folder import is_there

_FROZEN = ConfigDict(
    frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
)
_THEIRS = {
    "base_model": "base", "gate_mode": "gate", "source_model": "path",
    "positive_prompts": "prompts",
}  # fmt: skip
"""mergekit's keys, and what they are here."""

Gate = Literal["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random"]


class MixtureExpert(BaseModel):
    """One model whose feed-forward layers become an expert of every layer."""

    model_config = _FROZEN

    path: str
    """A folder or file of weights, of the base's architecture."""

    prompts: tuple[str, ...] = ()
    """Texts that this expert shall be asked about."""

    negative_prompts: tuple[str, ...] = ()
    """Texts that it shall not be asked about."""


class Mixture(BaseModel):
    """A mixture of dense models: attention, norms and embeddings are the base's."""

    model_config = _FROZEN

    base: str
    """The model that all but the feed-forward layers are taken from."""

    experts: Annotated[tuple[MixtureExpert, ...], Field(min_length=1)]
    """The experts, in order."""

    gate: Gate = "hidden"
    """What the rows of a gate are: the base's hidden state at the end of the prompts, before the
    layer (hidden), or its mean over their tokens (hidden_avg); the sum of the prompts' embeddings
    (cheap_embed, alike in all layers); or random numbers, for training: from a normal distribution,
    or as a linear layer begins (uniform_random)."""

    experts_per_token: Annotated[int, Field(ge=1)] = 2
    """Experts that compute for each token."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Stored dtype; that of the base when absent."""

    seed: int = 0
    """Seed of random gates."""

    @model_validator(mode="after")
    def _routes(self) -> Self:
        if self.experts_per_token > len(self.experts):
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, of {len(self.experts)} experts"
            )
        if self.gate in ("random", "uniform_random"):
            return self
        for number, expert in enumerate(self.experts, 1):
            if not expert.prompts:
                raise ValueError(f"gate {self.gate} needs prompts, but expert {number} has none")
        asked = {(expert.prompts, expert.negative_prompts) for expert in self.experts}
        if len(asked) == 1 and len(self.experts) > 1:
            raise ValueError("all experts have the same prompts, so nothing tells them apart")
        return self


def is_mixture(data: Mapping[str, Any]) -> bool:
    """Return True for the contents of a mergekit-moe configuration, or of one written here."""
    return "gate_mode" in data or "gate" in data or "shared_experts" in data


def make_mixture(data: Mapping[str, Any], *, where: str, base_dir: Path) -> Mixture:
    """Return the mixture that plain data describe, in mergekit-moe's words or in ours.

    Raises:
        RecipeError: an unknown key or a wrong value; says `where`.
    """
    renamed = _renamed(data)
    for key, reason in [
        ("shared_experts", "experts for all tokens are not supported yet"),
        ("architecture", "the architecture follows from the base's"),
    ]:
        if renamed.get(key) is not None:
            raise RecipeError(f"{where}: {key}: {reason}; remove the key.")
    experts: object = renamed.get("experts")
    if isinstance(experts, list):
        renamed["experts"] = [
            _renamed(cast("dict[str, Any]", entry)) if isinstance(entry, dict) else entry
            for entry in cast("list[object]", experts)
        ]
    try:
        mixture = Mixture.model_validate(renamed)
    except ValidationError as error:
        raise RecipeError(explain(error, Mixture, where)) from error

    def seen(path: str) -> str:
        there = base_dir / path
        return str(there) if not Path(path).is_absolute() and is_there(there) else path

    moved = [expert.model_copy(update={"path": seen(expert.path)}) for expert in mixture.experts]
    return mixture.model_copy(update={"base": seen(mixture.base), "experts": tuple(moved)})


def _renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    return {_THEIRS.get(key, key): value for key, value in data.items()}
