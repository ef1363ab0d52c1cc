"""A visit to the doctor: read the models once, run what can be run, and name what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mergewell.doctor.examinations.base import EXAMINATIONS, Severity, Trouble
from mergewell.doctor.patient import Model, Patient, shares_of
from mergewell.doctor.probe import INPUTS, Probe, probe
from mergewell.doctor.weights import TensorSums, measured_weights
from mergewell.errors import UserError
from mergewell.inputs import load_inputs
from mergewell.models.loader import ModuleSource
from mergewell.opening import open_model
from mergewell.plan import Plan, make_plan
from mergewell.recipe import Recipe, recipe_of_manifest
from mergewell.storage.base import Checkpoint
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import MANIFEST, read_manifest
from mergewell.tokenizers.vocabulary import read_vocabulary, tokenizer_files

ORDER: tuple[Severity, ...] = ("garbage", "damage", "doubt")
"""Severities, the worst first."""

OnStep = Callable[[str, int, int], None]
"""Called with the step's name, what of it is done and what there is."""


@dataclass(frozen=True, slots=True)
class Visit:
    """What a visit found."""

    troubles: tuple[Trouble, ...]
    """What is wrong, the worst first; nothing in health."""

    looked_at: tuple[str, ...]
    """Examinations that were made."""

    left_out: Mapping[str, str]
    """Examinations that could not be made, and why."""

    models: tuple[str, ...]
    tensors: int
    """Tensors whose numbers were read."""

    probe: Probe | None = None
    notes: tuple[str, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Return the visit as plain data: the contract of `mergewell doctor --json`."""
        seen = None
        if self.probe is not None:
            seen = {
                "inputs": self.probe.inputs,
                "random": not self.probe.own,
                "answers": [
                    {"model": a.name, "entropy": a.entropy, "commonest": a.commonest}
                    | {"finite": a.finite}
                    for a in self.probe.answers
                ],
            }
        return {
            "version": 1,
            "healthy": not self.troubles,
            "findings": [trouble.as_data() for trouble in self.troubles],
            "looked_at": list(self.looked_at),
            "left_out": dict(self.left_out),
            "models": list(self.models),
            "tensors": self.tensors,
            "probe": seen,
            "notes": list(self.notes),
        }


def doctor(
    recipe: Recipe | None = None,
    *,
    merged: str | Path | None = None,
    data: str | Path | None = None,
    model_factory: str | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Visit:
    """Return what is known to make merges garbage and is so here: before a merge, or of its result.

    Of a folder that mergewell wrote the manifest says what was merged, of others `recipe` does. A
    result's models are run on 32 inputs, of `data` or else random, where a module can be made.

    Raises:
        UserError: a model or the data cannot be opened, or nothing is named.
    """
    notes: list[str] = []
    folder = Path(merged) if merged is not None else None
    manifest = None
    if folder is not None and (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        if recipe is None and manifest.recipe:
            recipe = recipe_of_manifest(manifest, where=str(folder / MANIFEST))
    result = _model(folder.name, open_checkpoint(folder)) if folder is not None else None
    base, experts, plan, refusal = None, (), None, ""
    if recipe is not None:
        try:
            base, experts = _opened(recipe)
        except UserError as error:
            if folder is None:
                raise
            notes.append(f"The inputs were not looked at: {error}")
            recipe = None
        else:
            plan, refusal = _planned(recipe)
    patient = Patient(base, experts, result, recipe, plan, refusal, manifest)
    patient = replace(patient, sums=_weighed(patient, on_step))
    if result is not None and experts:
        found, why = _probed(patient, data, model_factory, seed)
        patient = replace(patient, probe=found)
        notes += [why] if why else []
    troubles: list[Trouble] = []
    left_out: dict[str, str] = {}
    for name in EXAMINATIONS.names():
        examination = EXAMINATIONS.build(name, {})
        if objection := examination.objection(patient):
            left_out[name] = objection
            continue
        troubles += [replace(each, examination=name) for each in examination.examine(patient)]
    return Visit(
        tuple(sorted(troubles, key=lambda t: ORDER.index(t.severity))),
        tuple(name for name in EXAMINATIONS.names() if name not in left_out),
        left_out,
        tuple(model.name for model in patient.models),
        len(patient.sums),
        patient.probe,
        tuple(notes),
    )


def _model(name: str, checkpoint: Checkpoint) -> Model:
    return Model(name, checkpoint, read_vocabulary(tokenizer_files(checkpoint)))


def _opened(recipe: Recipe) -> tuple[Model | None, tuple[Model, ...]]:
    """Open what a recipe names, whether or not it fits together."""
    base = None
    if recipe.base is not None:
        base = _model("the base", open_model(recipe.base, recipe.base_layers, stages=recipe.stages))
    under = base.checkpoint if base is not None else None
    experts = tuple(
        _model(each.path, open_model(each.path, each.layers, base=under, stages=recipe.stages))
        for each in recipe.experts
    )
    return base, experts


def _planned(recipe: Recipe) -> tuple[Plan | None, str]:
    try:
        return make_plan(recipe), ""
    except UserError as error:
        return None, str(error)


def _weighed(patient: Patient, on_step: OnStep | None) -> dict[str, TensorSums]:
    """Return the sums of every floating tensor that all models have in one shape."""
    models = [model.checkpoint for model in patient.weighed]
    if not models:
        return {}
    first = models[0]
    names = [
        name
        for name, spec in first.specs.items()
        if spec.dtype.is_floating_point
        and all(
            name in other
            and other.spec(name).shape == spec.shape
            and other.spec(name).dtype.is_floating_point
            for other in models
        )
    ]
    total = sum(first.spec(name).numel for name in names)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if on_step is not None:
            on_step("weights", done, total)

    stored = {name: _dtype(patient, name) for name in names}
    return measured_weights(
        models, names, shares=_shares(patient), stored=stored.__getitem__, on_progress=progress
    )


def _dtype(patient: Patient, name: str) -> torch.dtype:
    """Return the dtype in which the result holds, or would hold, a tensor."""
    if patient.merged is not None:
        return patient.merged.checkpoint.spec(name).dtype
    if patient.plan is not None and name in patient.plan.tasks:
        return patient.plan.tasks[name].spec.dtype
    return patient.weighed[0].checkpoint.spec(name).dtype


def _shares(patient: Patient) -> tuple[float, ...]:
    if patient.recipe is not None:
        return shares_of(patient.recipe)
    return (1.0 / len(patient.experts),) * len(patient.experts) if patient.experts else ()


def _probed(
    patient: Patient, data: str | Path | None, model_factory: str | None, seed: int
) -> tuple[Probe | None, str]:
    """Return what the models answer, or why they were not run."""
    assert patient.merged is not None
    path = patient.merged.checkpoint.path
    if model_factory is None and not (path / "config.json").is_file():
        why = f"{path} has no config.json, so name the module with --model-factory PKG:FUNC"
        return None, f"The models were not run: {why}."
    given = None
    if data is not None:
        given = load_inputs(data, model_folder=path if path.is_dir() else None, limit=INPUTS)
        if not isinstance(given, torch.Tensor):
            given = {name: values for name, values in given.items() if name != "labels"}
            given = next(iter(given.values())) if list(given) == ["inputs"] else given
    states = {m.name: m.checkpoint for m in (*patient.experts, patient.merged)}
    try:
        source = ModuleSource.parse(model_factory or path)
        return probe(states, source.build, given, seed=seed), ""
    except UserError as error:
        return None, f"The models were not run: {error}"
