"""Pipelines: diffusers folders of several components, merged component by component.

`model_index.json` names the components: those with weights (unet, transformer, vae, text_encoder)
are merged, each by a plan of its own, and the others (scheduler, tokenizer) are copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from mergewell.errors import CheckpointError, PlanError
from mergewell.opening import open_model
from mergewell.plan import Plan, make_plan
from mergewell.recipe import Recipe, Rule
from mergewell.run import OnProgress, run
from mergewell.storage.durable import sync_folder, writing
from mergewell.storage.folder import PIPELINE, is_there
from mergewell.storage.manifest import MANIFEST, Algorithm, Manifest, hash_file
from mergewell.storage.strict_json import read_object
from mergewell.storage.writer import require_free_name


def components_of(folder: str | Path) -> tuple[str, ...]:
    """Return the components that a pipeline's folder holds, in the order of its index.

    Raises:
        CheckpointError: there is no readable `model_index.json`.
    """
    place = Path(folder)
    index = read_object(place / PIPELINE, remedy="give a folder that diffusers saved")
    named = [k for k, v in index.items() if isinstance(v, list) and not k.startswith("_")]
    return tuple(name for name in named if (place / name).is_dir())


def plan_pipeline(recipe: Recipe) -> dict[str, Plan]:
    """Return the plan of each component that is merged: those that differ between the models.

    Every model of the recipe is a pipeline. A rule is for the components that have a tensor of its
    pattern; `COMPONENT/PATTERN` is for one.

    Raises:
        PlanError: models with other components, a rule that matches nothing, what a pipeline has
            no place for, or nothing that differs.
        UserError: as `make_plan`, for any component.
    """
    for key in ("calibration", "repair", "tokenizer", "stages"):
        if getattr(recipe, key):
            raise PlanError(f"{key} is of one model and not of a pipeline; merge the components.")
    reference = Path(recipe.models[0])
    names = components_of(reference)
    for model in recipe.models[1:]:
        if missing := [name for name in names if name not in components_of(model)]:
            raise PlanError(
                f"{model} lacks {', '.join(missing)} of the pipeline {reference}; give pipelines "
                "of one kind."
            )
    used: list[Rule] = []
    plans: dict[str, Plan] = {}
    for name in names:
        if not _has_weights(reference / name):
            continue
        rules = _rules(recipe, name)
        used += [rule for rule, _ in rules]
        if not _is_equal(recipe, name):
            plans[name] = make_plan(_component(recipe, name, tuple(own for _, own in rules)))
    for rule in recipe.rules:
        if rule not in used:
            raise PlanError(f"Rule {rule.match!r} matches no tensor of any component; mend it.")
    if not plans:
        raise PlanError(f"No component of {reference} differs between the models.")
    return plans


def merge_pipeline(
    recipe: Recipe,
    out: str | Path,
    *,
    plans: Mapping[str, Plan] | None = None,
    workers: int | None = None,
    algorithm: Algorithm = "xxh3-128",
    on_progress: OnProgress | None = None,
) -> dict[str, Manifest]:
    """Merge pipelines into the folder `out`; return the manifest of each component merged.

    The folder appears complete or not at all; each merged component has a manifest of its own.
    `plans` are those of `plan_pipeline` where they are known.

    Raises:
        UserError: as `plan_pipeline` and `run`.
    """
    folder = Path(out).resolve()
    require_free_name(folder)
    plans = plan_pipeline(recipe) if plans is None else plans
    reference = Path(recipe.models[0])
    growing = folder.with_name(f".{folder.name}.pipeline")
    manifests: dict[str, Manifest] = {}
    with writing(folder):
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
        try:
            for name in components_of(reference):
                if name in plans:
                    manifests[name] = run(
                        plans[name], growing / name, workers=workers, algorithm=algorithm,
                        on_progress=on_progress,
                    )  # fmt: skip
                else:
                    shutil.copytree(reference / name, growing / name)
            shutil.copyfile(reference / PIPELINE, growing / PIPELINE)
            sync_folder(growing)
            if folder.is_dir():
                folder.rmdir()  # an empty one may be written to
            os.rename(growing, folder)  # noqa: PTH104 - as the writer of a single model
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(growing, ignore_errors=True)
    return manifests


def _has_weights(folder: Path) -> bool:
    return any(True for kind in ("*.safetensors", "*.bin") for _ in folder.glob(kind))


def _is_equal(recipe: Recipe, component: str) -> bool:
    """Return whether all models have the same files of weights of a component."""
    hashes = [
        [hash_file(file) for file in checkpoint.files]
        for model in recipe.models
        for checkpoint in [open_model(str(Path(model) / component), ())]
    ]
    return all(found == hashes[0] for found in hashes)


def _rules(recipe: Recipe, component: str) -> list[tuple[Rule, Rule]]:
    """Return the rules for a component: as the recipe has them, and as its own."""
    with open_model(str(Path(recipe.models[0]) / component), ()) as checkpoint:
        names = [*checkpoint]
    found: list[tuple[Rule, Rule]] = []
    for rule in recipe.rules:
        before, slash, rest = rule.match.partition("/")
        if slash and before != component:
            continue
        own = rule.model_copy(update={"match": rest}) if slash else rule
        if any(fnmatchcase(name, own.match) for name in names):
            found.append((rule, own))
    return found


def component_recipe(recipe: Recipe, component: str) -> Recipe:
    """Return the recipe of one component, with the rules that match it."""
    return _component(recipe, component, tuple(own for _, own in _rules(recipe, component)))


def _component(recipe: Recipe, component: str, rules: tuple[Rule, ...]) -> Recipe:
    def inside(path: str) -> str:
        return str(Path(path) / component)

    changes: Mapping[str, object] = {
        "base": None if recipe.base is None else inside(recipe.base),
        "experts": tuple(
            expert.model_copy(update={"path": inside(expert.path)}) for expert in recipe.experts
        ),
        "rules": rules,
    }
    return recipe.model_copy(update=dict(changes))


def is_pipeline(path: str | Path) -> bool:
    """Return whether a path is a pipeline's folder."""
    return is_there(Path(path) / PIPELINE)


def is_of_pipelines(recipe: Recipe) -> bool:
    """Return whether a recipe's models, or some of them, are pipelines."""
    return any(is_pipeline(model) for model in recipe.models)


def merged_components(folder: str | Path) -> tuple[str, ...]:
    """Return the components of a pipeline's folder that have a manifest: those merged.

    Raises:
        CheckpointError: there is none, or no readable `model_index.json`.
    """
    names = tuple(n for n in components_of(folder) if is_there(Path(folder) / n / MANIFEST))
    if not names:
        raise CheckpointError(
            f"{folder}: no component has a {MANIFEST}, so none was merged by mergewell; name a "
            "merged folder."
        )
    return names
