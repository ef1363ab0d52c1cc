"""BatchNorm statistics: averaged, never measured, or impossible."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mergewell.doctor.examinations.base import Examination, Trouble, named
from mergewell.doctor.patient import Model, Patient
from mergewell.storage.manifest import repair_of

SPREAD = 0.1
"""How far experts' running means may lie apart, squared, in units of their running variance; and
by how much their variances may differ, as a fraction."""


class BatchNorm(Examination):
    """BatchNorm statistics that do not belong to the weights they stand beside."""

    def examine(self, patient: Patient) -> Iterator[Trouble]:
        """Yield models with impossible statistics, and merges that only average differing ones."""
        for model in patient.models:
            yield from _impossible(model)
        if patient.merged is not None and patient.manifest is None:
            return
        repaired = patient.recipe is not None and patient.recipe.repair is not None
        repaired |= patient.manifest is not None and bool(repair_of(patient.manifest))
        differing = _differing(patient)
        if repaired or not differing:
            return
        name = patient.merged.name if patient.merged is not None else "the merge"
        first = patient.merged.checkpoint.path if patient.merged is not None else "DIR"
        yield Trouble(
            "damage",
            f"{name}: the experts' BatchNorm statistics differ in {named(differing)}, and their "
            "average is not what the merged weights give; measure them with `mergewell repair "
            f"{first} --data PATH --out NEW`, or a step `repair` in the recipe.",
            name,
            tuple(differing[:3]),
        )


def _impossible(model: Model) -> Iterator[Trouble]:
    held = model.checkpoint
    bad = [n for n in held if n.endswith("running_var") and bool((held[n] < 0).any())]
    fresh = [n for n in held if n.endswith("num_batches_tracked") and int(held[n].max()) == 0]
    unmeasured = [
        layer
        for n in fresh
        if (layer := n.rpartition(".")[0]) + ".running_var" in held
        and bool((held[f"{layer}.running_var"] == 1).all())
        and not bool(held[f"{layer}.running_mean"].any())
    ]
    if bad:
        yield Trouble(
            "garbage",
            f"{model.name}: {named(bad)} holds variances below zero; measure the statistics anew "
            "with `mergewell repair`.",
            model.name,
            tuple(bad[:3]),
        )
    if unmeasured:
        yield Trouble(
            "damage",
            f"{model.name}: the BatchNorm statistics of {named(unmeasured)} were never measured; "
            "run the model over some data in training mode first, or `mergewell repair` the merge.",
            model.name,
            tuple(unmeasured[:3]),
        )


def _differing(patient: Patient) -> list[str]:
    """Return the layers whose statistics differ between the experts."""
    if len(patient.experts) < 2:
        return []
    files = [model.checkpoint for model in patient.experts]
    found: list[str] = []
    for name in files[0]:
        layer, _, part = name.rpartition(".")
        if part != "running_var" or not all(f"{layer}.running_mean" in one for one in files):
            continue
        if not all(name in one and one.spec(name) == files[0].spec(name) for one in files):
            continue
        means, variances = (
            torch.stack([one[f"{layer}.{what}"].double() for one in files])
            for what in ("running_mean", "running_var")
        )
        if _apart(means, variances):
            found.append(layer)
    return found


def _apart(means: Tensor, variances: Tensor) -> bool:
    """Return whether statistics of K experts, [K, C] each, differ in most channels."""
    middle = variances.mean(0).clamp_min(1e-12)
    shift = means.var(0, correction=0) / middle
    ratio = (variances.amax(0) - variances.amin(0)) / middle
    return float(shift.median()) > SPREAD or float(ratio.median()) > 2 * SPREAD
