"""What the flags name: a recipe, and data with the architecture that takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mergewell.errors import ModelError, RecipeError, did_you_mean
from mergewell.flags import recipe_from_flags
from mergewell.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from mergewell.calibration.data import Data

_BATCH = 16
"""Samples that models are run on at a time."""


def chosen_recipe(
    recipe_file: Path | None,
    *,
    base: str | None,
    experts: Sequence[str],
    method: str | None,
    settings: Sequence[str],
    seed: int | None = None,
    dtype: str | None = None,
) -> Recipe:
    """Return the recipe in a file, or the one that flags make.

    Raises:
        RecipeError: a recipe and flags that would change it, or either is wrong.
    """
    if recipe_file is None:
        return recipe_from_flags(
            base=base, experts=experts, method=method or "average", settings=settings,
            seed=seed or 0, dtype=dtype,
        )  # fmt: skip
    flags = {
        "--base": base, "--expert": experts or None, "--method": method, "--set": settings or None,
        "--seed": seed, "--dtype": dtype,
    }  # fmt: skip
    beside = [flag for flag, value in flags.items() if value is not None]
    if beside:
        raise RecipeError(
            f"{recipe_file}: a recipe and {', '.join(beside)} exclude each other; "
            "put what you want into the recipe."
        )
    return read_recipe(recipe_file)


def read_data(
    recipe: Recipe,
    data: str,
    *,
    mode: str,
    samples: int,
    model_factory: str | None,
    gram: bool = False,
) -> Data:
    """Return the inputs at a path, with the architecture that takes them.

    Raises:
        RecipeError: an unknown mode.
        ModelError: nothing says what the architecture is.
        DataError: the inputs cannot be read.
    """
    from mergewell.calibration.data import Data
    from mergewell.inputs import batches, load_inputs
    from mergewell.models.capture import Mode
    from mergewell.models.loader import ModuleSource

    if mode not in get_args(Mode):
        raise RecipeError(f"--mode {mode}: {did_you_mean(mode, get_args(Mode))}")
    if model_factory is None and not Path(recipe.base or "").is_dir():
        raise ModelError(
            f"{recipe.base} is no Hugging Face folder, so --data needs --model-factory "
            "PKG:FUNC (or timm:NAME), which makes the module that takes these weights."
        )
    source = ModuleSource.parse(model_factory or str(recipe.base))
    inputs = load_inputs(data, model_folder=recipe.base, limit=samples)
    cut = tuple(batches(inputs, _BATCH))
    count = sum(len(b) if not isinstance(b, dict) else len(next(iter(b.values()))) for b in cut)
    return Data(source.build, cut, count, mode, gram=gram)  # pyright: ignore[reportArgumentType]
