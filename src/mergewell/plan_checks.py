"""What planning asks of models and methods before a tensor is read, and what it warns of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePath
from typing import cast

from mergewell.errors import PlanError
from mergewell.methods.base import MergeMethod
from mergewell.recipe import LayerRange, Recipe
from mergewell.storage.adapter import AdapterCheckpoint
from mergewell.storage.checkpoint import Checkpoint
from mergewell.storage.spec import TensorSpec

CONFIG_KEYS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings",
)  # fmt: skip


def warnings_about(
    recipe: Recipe, reference: Checkpoint, experts: Sequence[Checkpoint]
) -> list[str]:
    """Return what deserves a second look, sentence by sentence.

    Raises:
        PlanError: configurations of different architectures.
    """
    return [
        *compare_configs(reference, experts),
        *same_paths(recipe),
    ]


def check_needs(
    method: MergeMethod,
    coefficients: tuple[float, ...],
    base: Checkpoint | None,
    experts: Sequence[Checkpoint],
) -> None:
    """Raise PlanError where a method lacks a base, experts, or a value for each of them."""
    name = method.component_name()
    if method.needs.base and base is None:
        raise PlanError(f"{name} needs the base of the experts; name it with `base` or --base.")
    if method.needs.experts is not None and method.needs.experts != len(experts):
        raise PlanError(
            f"{name} takes {method.needs.experts} experts, but {len(experts)} are named."
        )
    for field in type(method).model_fields:
        value = getattr(method, field)
        if not isinstance(value, tuple) or field == "layers":
            continue
        if len(cast("tuple[float, ...]", value)) != len(experts):
            raise PlanError(
                f"{name}: {field} has {len(cast('tuple[float, ...]', value))} values for "
                f"{len(experts)} experts; give one value, or one an expert."
            )
    if objection := method.objection(coefficients):
        raise PlanError(f"{name}: {objection}.")


def find(checkpoint: Checkpoint, name: str, reference: Checkpoint) -> TensorSpec:
    """Return what a checkpoint's header says of a tensor; raise PlanError where it lacks it."""
    if name not in checkpoint:
        missing = [n for n in reference if n not in checkpoint]
        raise PlanError(
            f"{checkpoint.path}: {listed(missing)} missing, but in {reference.path}; is it of the "
            f"same architecture? To keep the base's, add a rule {{match: {missing[0]!r}, "
            "method: {name: keep, model: 0}}."
        )
    spec = checkpoint.spec(name)
    return TensorSpec(name, spec.dtype, spec.shape)


def listed(names: Sequence[str]) -> str:
    """Return one or two names, how many more there are, and the verb."""
    if len(names) == 1:
        return f"{names[0]} is"
    shown = ", ".join(islice(names, 2))
    return f"{shown}{f' and {len(names) - 2} more' if len(names) > 2 else ''} are"


def compare_configs(reference: Checkpoint, experts: Sequence[Checkpoint]) -> list[str]:
    """Return warnings about configurations; raise where they show another architecture."""
    warnings: list[str] = []
    ours = reference.config
    for expert in experts:
        theirs = expert.config
        if ours is None or theirs is None:
            continue
        for key in CONFIG_KEYS:
            if key in ours and key in theirs and ours[key] != theirs[key]:
                raise PlanError(
                    f"{expert.path}: config.json says {key} = {theirs[key]!r}, but "
                    f"{reference.path} says {ours[key]!r}; these are not of one base."
                )
        if ours.get("architectures") != theirs.get("architectures"):
            warnings.append(
                f"{expert.path}: architectures {theirs.get('architectures')} differ from "
                f"{ours.get('architectures')} of {reference.path}."
            )
    return warnings


def same_paths(recipe: Recipe) -> list[str]:
    """Return a warning for each model that is named twice."""
    seen: set[tuple[Path, tuple[LayerRange, ...]]] = set()
    warnings: list[str] = []
    models = [(expert.path, expert.layers) for expert in recipe.experts]
    if recipe.base is not None:
        models.insert(0, (recipe.base, recipe.base_layers))
    for path, layers in models:
        real = (Path(path).resolve(), layers)
        if real in seen:
            warnings.append(f"{path} is named twice.")
        seen.add(real)
    return warnings


def other_bases(reference: Checkpoint, experts: Sequence[Checkpoint]) -> list[str]:
    """Return a warning for each adapter that says it was trained on a base of another name."""
    warnings: list[str] = []
    for expert in experts:
        if not isinstance(expert, AdapterCheckpoint) or expert.settings.base_name is None:
            continue
        trained = expert.settings.base_name
        if PurePath(trained).name.lower() not in str(reference.path.resolve()).lower():
            warnings.append(
                f"{expert.path}: the adapter says that it was trained on {trained}; the base here "
                f"is {reference.path}."
            )
    return warnings
