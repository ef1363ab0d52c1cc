"""Mixture: which models become the experts of a mixture, and how inputs find theirs."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML

from mergewell.component import explain
from mergewell.errors import RecipeError
from mergewell.recipe import yaml_documents
from mergewell.storage.folder import is_there
from mergewell.storage.manifest import manifest_at

_FROZEN = ConfigDict(
    frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
)
_THEIRS = {
    "base_model": "base", "gate_mode": "gate", "source_model": "path",
    "positive_prompts": "prompts", "noise_scale": "noise", "residual_scale": "scale",
}  # fmt: skip
"""mergekit's keys, and what they are here."""

_OF_EXPERTS = {"source_model", "positive_prompts", "prompts", "negative_prompts"}
"""Keys of experts that no recipe has."""

_WORDS = ("gate", "shared_experts", "experts_per_token", *sorted(_OF_EXPERTS))

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

    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of normal noise that is added to its weights, for training."""

    scale: float = 1.0
    """Scales what it adds to the residual stream: its down projection."""


class Mixture(BaseModel):
    """A mixture of dense models: attention, norms and embeddings are the base's."""

    model_config = _FROZEN

    base: str
    """The model that all but the feed-forward layers are taken from."""

    experts: Annotated[tuple[MixtureExpert, ...], Field(min_length=1)]
    """The experts, in order."""

    shared_experts: tuple[MixtureExpert, ...] = ()
    """Experts that every token goes through, beside those it is routed to: of Qwen2 models one,
    whose prompts say when it counts; of other architectures none."""

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
    """Seed of random gates and of noise."""

    @property
    def all_experts(self) -> tuple[MixtureExpert, ...]:
        """The routed experts and then the shared ones."""
        return (*self.experts, *self.shared_experts)

    def to_yaml(self) -> str:
        """Return the mixture as YAML in our own words."""
        stream = StringIO()
        yaml = YAML()
        yaml.default_flow_style = False
        yaml.dump(
            {"gate": self.gate, **self.model_dump(mode="json", exclude_defaults=True)}, stream
        )
        return stream.getvalue()

    @model_validator(mode="after")
    def _routes(self) -> Self:
        if self.experts_per_token > len(self.experts):
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, of {len(self.experts)} experts"
            )
        if self.gate in ("random", "uniform_random"):
            return self
        for kind, experts in (("expert", self.experts), ("shared expert", self.shared_experts)):
            for number, expert in enumerate(experts, 1):
                if not expert.prompts:
                    raise ValueError(f"gate {self.gate} needs prompts, {kind} {number} has none")
        asked = {(expert.prompts, expert.negative_prompts) for expert in self.experts}
        if len(asked) == 1 and len(self.experts) > 1:
            raise ValueError("all experts have the same prompts, so nothing tells them apart")
        return self


def is_mixture(data: Mapping[str, Any]) -> bool:
    """Return True for the contents of a mergekit-moe configuration, or of one written here."""
    if any(key in data for key in ("gate_mode", "gate", "shared_experts", "experts_per_token")):
        return True
    experts: object = data.get("experts")
    entries = cast("list[object]", experts) if isinstance(experts, list) else []
    return any(
        isinstance(entry, dict) and not _OF_EXPERTS.isdisjoint(cast("dict[str, Any]", entry))
        for entry in entries
    )


def make_mixture(data: Mapping[str, Any], *, where: str, base_dir: Path) -> Mixture:
    """Return the mixture that plain data describe, in mergekit-moe's words or in ours.

    Raises:
        RecipeError: an unknown key or a wrong value; says `where`.
    """
    renamed = _renamed(data)
    if renamed.get("architecture") is not None:
        raise RecipeError(
            f"{where}: architecture: the architecture follows from the base's; remove the key."
        )
    for key in ("experts", "shared_experts"):
        experts: object = renamed.get(key)
        if isinstance(experts, list):
            renamed[key] = [
                _renamed(cast("dict[str, Any]", entry)) if isinstance(entry, dict) else entry
                for entry in cast("list[object]", experts)
            ]
    try:
        mixture = Mixture.model_validate(renamed)
    except ValidationError as error:
        raise RecipeError(explain(error, Mixture, where)) from error

    return _beside(mixture, base_dir)


def read_mixture(path: str | Path) -> Mixture | None:
    """Return the mixture that a file of YAML describes; None if the file is something else.

    The file may also be the manifest of a mixture's folder, which makes the same mixture again.

    Raises:
        RecipeError: an unknown key or a wrong value.
        CheckpointError: the manifest is malformed.
    """
    file = Path(path)
    manifest = manifest_at(file)
    if manifest is not None:
        data: object = (manifest.model_extra or {}).get("mixture")
        if not isinstance(data, dict):
            return None
        here = Path(manifest.directory)
        found = make_mixture(cast("dict[str, Any]", data), where=str(file), base_dir=Path())
        return found if here == Path.cwd() else _beside(found, here)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None  # `read_recipe` says what is wrong
    if not any(word in text for word in _WORDS):  # parsing a long recipe twice takes its time
        return None
    contents = yaml_documents(text, file)
    if len(contents) != 1 or not is_mixture(contents[0]):
        return None
    return make_mixture(contents[0], where=str(file), base_dir=file.parent)


def _beside(mixture: Mixture, folder: Path) -> Mixture:
    """Return the mixture with paths that were meant relative to `folder` as seen from here."""

    def seen(path: str) -> str:
        there = folder / path
        return str(there) if not Path(path).is_absolute() and is_there(there) else path

    def moved(experts: tuple[MixtureExpert, ...]) -> tuple[MixtureExpert, ...]:
        return tuple(e.model_copy(update={"path": seen(e.path)}) for e in experts)

    changes = {
        "base": seen(mixture.base),
        "experts": moved(mixture.experts),
        "shared_experts": moved(mixture.shared_experts),
    }
    return mixture.model_copy(update=changes)


def _renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    return {_THEIRS.get(key, key): value for key, value in data.items() if value is not None}
