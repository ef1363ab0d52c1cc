"""What the flags name: a recipe, and data with the architecture that takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mergewell.errors import DataError, ModelError, RecipeError, did_you_mean
from mergewell.flags import recipe_from_flags
from mergewell.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from mergewell.calibration.data import Data
    from mergewell.learners.base import Material
    from mergewell.models.dataflow import Batch
    from mergewell.models.loader import ModuleSource
    from mergewell.plan import Plan

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
    calibration: str | None = None,
) -> Recipe:
    """Return the recipe in a file, or the one that flags make.

    Raises:
        RecipeError: a recipe and flags that would change it, or either is wrong.
    """
    if recipe_file is None:
        return recipe_from_flags(
            base=base, experts=experts, method=method or "average", settings=settings,
            seed=seed or 0, dtype=dtype, calibration=calibration,
        )  # fmt: skip
    flags = {
        "--base": base, "--expert": experts or None, "--method": method, "--set": settings or None,
        "--seed": seed, "--dtype": dtype, "--calibration": calibration,
    }  # fmt: skip
    beside = [flag for flag, value in flags.items() if value is not None]
    if beside:
        raise RecipeError(
            f"{recipe_file}: a recipe and {', '.join(beside)} exclude each other; "
            "put what you want into the recipe."
        )
    return read_recipe(recipe_file)


def refuse_flags(flags: Mapping[str, object], reason: str) -> None:
    """Refuse flags that are set where they have no meaning.

    Raises:
        RecipeError: a flag's value is neither None nor False.
    """
    for flag, value in flags.items():
        if value is not None and value is not False:
            raise RecipeError(f"{flag}: {reason}, so it has no meaning here; drop it.")


def read_data(
    recipe: Recipe,
    data: str | Sequence[str],
    *,
    folder: Path | None = None,
    mode: str,
    samples: int,
    model_factory: str | None,
    gram: bool = False,
    fisher: str | None = None,
) -> Data:
    """Return the inputs at a path, with the architecture that takes them.

    Of several paths, one an expert, each holds inputs of that expert's task, and an equal part of
    the samples comes from each. `folder` is that of the plan's reference, where a model of the Hub
    lies; it is looked for if absent.

    Raises:
        RecipeError: an unknown mode or likelihood.
        ModelError: nothing says what the architecture is.
        DataError: the inputs cannot be read, or are neither one path nor one an expert.
    """
    from mergewell.calibration.data import Data
    from mergewell.inputs import load_inputs
    from mergewell.models.capture import Mode
    from mergewell.models.fisher import Likelihood
    from mergewell.storage.hub import local_path

    if fisher is not None and fisher not in get_args(Likelihood):
        raise RecipeError(f"--fisher {fisher}: {did_you_mean(fisher, get_args(Likelihood))}")
    if mode not in get_args(Mode):
        raise RecipeError(f"--mode {mode}: {did_you_mean(mode, get_args(Mode))}")
    home = local_path(recipe.base or recipe.experts[0].path) if folder is None else folder
    source = source_of(home, model_factory, asked_by="--data")
    paths = [data] if isinstance(data, str) else [*data]
    if len(paths) not in (1, len(recipe.experts)):
        raise DataError(
            f"{len(paths)} paths of data are named for {len(recipe.experts)} experts; name one, or "
            "one for each expert, in their order."
        )
    limits = [len(range(number, samples, len(paths))) for number in range(len(paths))]
    if 0 in limits:
        raise DataError(f"{samples} samples are too few for {len(paths)} experts; ask for more.")
    read = [
        _cut(_unlabelled(load_inputs(path, model_folder=home, limit=limit)), path)
        for path, limit in zip(paths, limits, strict=True)
    ]
    cut = tuple(chain.from_iterable(read))
    owners = [number for number, own in enumerate(read) for _ in own] if len(paths) > 1 else ()
    count = sum(len(b) if not isinstance(b, dict) else len(next(iter(b.values()))) for b in cut)
    return Data(
        source.build,
        cut,
        count,
        mode,  # pyright: ignore[reportArgumentType]
        gram=gram,
        fisher=fisher,  # pyright: ignore[reportArgumentType]
        owners=owners,
    )


def _cut(inputs: Batch, path: str) -> tuple[Batch, ...]:
    """Return inputs in batches; texts, which were padded here, with others of their length."""
    from mergewell.inputs import batches, batches_by_length

    if Path(path).suffix == ".jsonl" and isinstance(inputs, Mapping):
        return tuple(batches_by_length(inputs, _BATCH))
    return tuple(batches(inputs, _BATCH))


def _unlabelled(inputs: Batch) -> Batch:
    """Return inputs without `labels`, which files for `learn` and `evaluate` hold beside them."""
    if not isinstance(inputs, dict) or set(inputs) <= {"labels"} or "labels" not in inputs:
        return inputs
    rest = {name: values for name, values in inputs.items() if name != "labels"}
    return next(iter(rest.values())) if len(rest) == 1 else rest


def source_of(folder: Path, model_factory: str | None, *, asked_by: str) -> ModuleSource:
    """Return where the module comes from that takes the weights of a model in `folder`.

    Raises:
        ModelError: nothing says; `asked_by` is what wants to know.
    """
    from mergewell.models.loader import ModuleSource

    if model_factory is None and not folder.is_dir():
        raise ModelError(
            f"{folder} is no Hugging Face folder, so {asked_by} needs --model-factory PKG:FUNC (or "
            "timm:NAME), which makes the module that takes these weights."
        )
    return ModuleSource.parse(model_factory or folder)


def material_of(
    planned: Plan, source: ModuleSource, paths: Sequence[str], samples: int
) -> tuple[Material, int]:
    """Return what a learner may use, and how many samples that is.

    Of several paths, one an expert, each holds inputs of that expert's task, and an equal part of
    the samples comes from each.

    Raises:
        DataError: the inputs cannot be read, or are neither one path nor one an expert.
    """
    from functools import partial

    from mergewell.descent.tasks import LearningTask
    from mergewell.errors import DataError
    from mergewell.labelled import accuracy, joined_labelled, load_labelled
    from mergewell.learners.base import Material

    count = len(planned.experts)
    if len(paths) not in (1, count):
        if not paths:
            raise DataError(
                "No inputs are named; add --data PATH (.npz, .safetensors, .jsonl, folder)."
            )
        raise DataError(
            f"{len(paths)} paths of data are named for {count} experts; name one, or one for each "
            "expert, in their order."
        )
    if samples < 2 * len(paths):
        raise DataError(f"{samples} samples are too few for {count} experts; ask for more.")
    read = [
        load_labelled(
            path,
            model_folder=planned.reference.path,
            limit=len(range(number, samples, len(paths))),
        )
        for number, path in enumerate(paths)
    ]
    tasks = [
        LearningTask(number if len(paths) > 1 else None, each.batches, each.labels_by_batch)
        for number, each in enumerate(read)
    ]
    whole = joined_labelled(read)
    metric = None if whole.labels is None else partial(accuracy, data=whole)
    return Material(source.build, metric, tasks), whole.samples
