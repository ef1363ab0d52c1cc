"""The library in ten functions, one for each thing that the command line does.

A recipe is given as a `Recipe`, as a path (YAML of ours or of mergekit, or a merge's
`manifest.json`) or as plain data. Everything lazy lives in `mergewell/__init__.py`, which lends
these functions their place: `from mergewell import load_recipe, merge_recipe`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mergewell.calibration.collect import calibrate
from mergewell.calibration.file import write_calibration
from mergewell.calibration.result import Calibration
from mergewell.check import check, short_names
from mergewell.cli.given import material_of, read_data
from mergewell.doctor.visit import Visit, doctor
from mergewell.engines.base import one_thread_a_worker
from mergewell.errors import ModelError
from mergewell.evaluation.compared import Comparison, compare
from mergewell.evaluation.given import Metric, given_measures
from mergewell.evaluation.models import Models
from mergewell.learners.base import LEARNERS, Learned, Material
from mergewell.models.loader import ModuleSource
from mergewell.plan import Plan, make_plan
from mergewell.recipe import Recipe, make_recipe, read_recipe
from mergewell.report.results import Check
from mergewell.run import run
from mergewell.storage.manifest import Manifest, verify_files
from mergewell.tune.given import METHODS, tune_given
from mergewell.tune.metric import goal_of
from mergewell.tune.objective import Outputs, Reference
from mergewell.tune.search import Tuned
from mergewell.verify import Verified, verify_deep

RecipeLike = Recipe | str | Path | Mapping[str, Any]
"""A recipe, its file, or its plain data."""

Paths = str | Path | Sequence[str | Path]
"""One path of data, or one an expert, each of that expert's task."""

OnStep = Callable[[str, int, int], None]
"""Called with the step's name, what is done of it and what there is to do."""


def load_recipe(recipe: RecipeLike) -> Recipe:
    """Return a recipe from a file, from plain data, or as it is.

    Raises:
        RecipeError: no such file, or not a recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return make_recipe(recipe)
    return read_recipe(recipe)


def plan_recipe(recipe: RecipeLike) -> Plan:
    """Return what every tensor will get, with costs and warnings; reads headers only.

    Raises:
        UserError: whatever headers, configurations and tokenizers show to be wrong.
    """
    return make_plan(load_recipe(recipe))


def check_recipe(
    recipe: RecipeLike,
    *,
    data: Paths = (),
    model_factory: str | None = None,
    samples: int = 128,
    mode: str = "merged",
    deep: bool = False,
    on_step: OnStep | None = None,
) -> Check:
    """Return whether the experts will merge: a verdict, M-Loss by layer, a prediction.

    Without `data` only the weights are asked; `deep` also decomposes matrices.

    Raises:
        UserError: no base, or models and data that do not fit one another.
    """
    planned = plan_recipe(recipe)
    paths = _paths(data)
    used = None
    if paths:
        used = read_data(
            planned.recipe, paths, mode=mode, samples=samples, model_factory=model_factory
        )
    names = short_names(expert.path for expert in planned.recipe.experts)
    return check(planned, names, data=used, deep=deep, on_step=on_step)


def merge_recipe(
    recipe: RecipeLike,
    out: str | Path,
    *,
    workers: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Merge; the folder `out` appears complete or not at all.

    `on_progress` is called with the bytes that were just written.

    Raises:
        UserError: a recipe that cannot be planned, or an output that cannot be written.
    """
    return run(
        plan_recipe(recipe), out, workers=workers, device=device, resume=resume,
        on_progress=on_progress,
    )  # fmt: skip


def calibrate_recipe(
    recipe: RecipeLike,
    data: Paths,
    *,
    out: str | Path | None = None,
    model_factory: str | None = None,
    samples: int = 128,
    mode: str = "merged",
    gram: bool = False,
    fisher: str | None = None,
    on_step: OnStep | None = None,
) -> Calibration:
    """Return what the models do on a few unlabelled inputs, and write it to `out` if given.

    Raises:
        UserError: models and data that do not fit one another.
    """
    planned = plan_recipe(recipe)
    used = read_data(
        planned.recipe, _paths(data), mode=mode, samples=samples, model_factory=model_factory,
        gram=gram, fisher=fisher,
    )  # fmt: skip
    found = calibrate(planned, used, on_step=on_step)
    if out is not None:
        write_calibration(out, found)
    return found


def learn_recipe(
    recipe: RecipeLike,
    learner: str,
    data: Paths = (),
    *,
    parameters: Mapping[str, Any] | None = None,
    metric: Metric | None = None,
    model_factory: str | None = None,
    samples: int = 1024,
    on_step: OnStep | None = None,
) -> Learned:
    """Return the recipe that a learner, such as greedy_soup, makes of a recipe and data.

    A `metric`, any Python function of a module, takes the place of accuracy on the labels.

    Raises:
        UserError: an unknown learner, or one that lacks data.
    """
    made = LEARNERS.build(learner, parameters or {})
    planned = plan_recipe(recipe)
    source, paths = _source(planned, model_factory), _paths(data)
    material = Material(source.build)
    if paths or metric is None:
        material = material_of(planned, source, paths, samples)[0]
    if metric is not None:
        material = Material(
            source.build, goal_of(metric, planned, data=paths, samples=samples), material.tasks
        )
    with one_thread_a_worker():
        return made.learn(planned.recipe, material, on_step=on_step)


def tune_recipe(
    recipe: RecipeLike,
    data: Paths = (),
    *,
    methods: Sequence[str] = METHODS,
    budget: int = 10,
    search: Literal["grid", "line", "optuna"] = "grid",
    journal: str | Path | None = None,
    engine: Literal["here", "ray"] = "here",
    reference: Reference | None = None,
    outputs: Outputs = "logits",
    metric: Metric | None = None,
    patience: int | None = None,
    model_factory: str | None = None,
    samples: int = 16,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Tuned:
    """Return the recipe with the method and parameters that come nearest to a reference.

    Needs no labels. With a `metric`, any Python function of a module, that is what decides, and
    data are not needed, unless it is `labels`; `divergence` is then the metric's negative. What the
    options mean: `mergewell tune --help`.

    Raises:
        UserError: an unknown method, or models and data that do not fit one another.
    """
    planned, paths = plan_recipe(recipe), _paths(data)
    source = _source(planned, model_factory)
    with one_thread_a_worker():
        tasks = ()
        if metric is None:
            tasks = material_of(planned, source, paths, samples * max(1, len(paths)))[0].tasks
        return tune_given(
            planned, source.build, tasks, methods=methods, budget=budget, search=search,
            journal=journal, engine=engine, reference=reference, outputs=outputs, metric=metric,
            data=paths, samples=samples, patience=patience, seed=seed, on_step=on_step,
        )  # fmt: skip


def evaluate_models(
    models: Mapping[str, str | Path],
    data: Mapping[str, str | Path] | None = None,
    *,
    metrics: Sequence[Metric] = (),
    base: str | Path | None = None,
    experts: Sequence[str] = (),
    model_factory: str | None = None,
    samples: int = 1024,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Comparison:
    """Return how models, by name, do at tasks: accuracy, perplexity or any metric, with intervals.

    `data` are the tasks' files by name; if there are several, in the order of `experts`, which are
    names among the models and what retention is held against. `base` opens adapters.

    Raises:
        UserError: models, data or metrics that cannot be read or do not fit one another.
    """
    under = str(base) if base is not None else None
    paths = {name: str(path) for name, path in models.items()}
    opened = Models(paths, base=under, model_factory=model_factory)
    tasks = {name: str(path) for name, path in (data or {}).items()}
    measures = given_measures(
        tasks, metrics, experts=len(experts), folder=opened.folder, samples=samples
    )
    with one_thread_a_worker():
        return compare(opened, measures, experts=experts, seed=seed, on_progress=on_step)


def verify_folder(folder: str | Path, *, deep: bool = False) -> Verified:
    """Return what is wrong with a merged folder; `deep` also makes a sample of tensors again.

    Raises:
        CheckpointError: there is no readable manifest.
    """
    return verify_deep(folder) if deep else Verified(tuple(verify_files(Path(folder))))


def examine_merge(
    recipe: RecipeLike | None = None,
    *,
    merged: str | Path | None = None,
    data: str | Path | None = None,
    model_factory: str | None = None,
    on_step: OnStep | None = None,
) -> Visit:
    """Return what is known to make merges garbage and is so here: of a recipe, or of its result.

    Raises:
        UserError: a model or the data cannot be opened.
    """
    wanted = load_recipe(recipe) if recipe is not None else None
    return doctor(wanted, merged=merged, data=data, model_factory=model_factory, on_step=on_step)


def _paths(data: Paths) -> list[str]:
    return [str(data)] if isinstance(data, (str, Path)) else [str(path) for path in data]


def _source(planned: Plan, model_factory: str | None) -> ModuleSource:
    folder = planned.reference.path
    if model_factory is None and not folder.is_dir():
        raise ModelError(f"{folder} is no Hugging Face folder, so give a model_factory.")
    return ModuleSource.parse(model_factory or folder)
