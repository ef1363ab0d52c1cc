"""The commands `explain` and `repair`: arguments, and what they do and print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergewell.explain.explanation import Explanation
    from mergewell.models.loader import ModuleSource
    from mergewell.plan import Plan

Base = Annotated[str | None, typer.Option(metavar="PATH", help="The model all experts came from.")]
Experts = Annotated[
    list[str] | None, typer.Option("--expert", metavar="PATH", help="An expert; repeat.")
]
Data = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Inputs; .npz or .safetensors may hold `labels`."),
]
Samples = Annotated[int, typer.Option(min=2, help="At most this many inputs.")]
Factory = Annotated[
    str | None,
    typer.Option(metavar="PKG:FUNC", help="Function that makes the module, or timm:NAME."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def explain(
    base: Base = None,
    expert: Experts = None,
    data: Data = None,
    model_factory: Factory = None,
    classifier: Annotated[
        str | None, typer.Option(metavar="LAYER", help="The last linear layer; found if absent.")
    ] = None,
    samples: Samples = 512,
    seed: Annotated[int, typer.Option(help="Seed of noise and intervals.")] = 0,
    json: Json = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page.")] = None,
) -> None:
    """Explain what averaging does: templates, features against weights, stability."""
    from mergewell.cli.progress import steps
    from mergewell.engines.base import one_thread_a_worker
    from mergewell.errors import RecipeError
    from mergewell.explain.explanation import explain as explain_experts
    from mergewell.labelled import load_labelled

    if html is not None:  # before the work, not after it
        from mergewell.report.files import require_own_page

        require_own_page(html)
    planned, source = opened(base, expert or [], model_factory)
    for each in planned.recipe.experts:
        if each.coefficient != 1.0:
            raise RecipeError(
                f"explain averages the experts uniformly, but {each.path} has the coefficient "
                f"{each.coefficient:g}; drop it."
            )
    inputs = load_labelled(needed_data(data), model_folder=planned.reference.path, limit=samples)
    modules = built(planned, source)
    with steps() as shown, one_thread_a_worker():
        found = explain_experts(
            modules, inputs, classifier=classifier, seed=seed, on_step=shown.update
        )
    if html is not None:
        from mergewell.report.explain_page import write_explain_page

        write_explain_page(found, html)
    if json:
        print_json(found.as_data())
        return
    _print(found)


def repair(
    folder: Annotated[Path, typer.Argument(help="The merged folder.")],
    data: Data = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder to write.")] = None,
    kind: Annotated[
        str, typer.Option(help="batch_norm: statistics measured anew; repair: REPAIR.")
    ] = "batch_norm",
    model_factory: Factory = None,
    samples: Samples = 1024,
    json: Json = False,
) -> None:
    """Mend the activation statistics of a merged model; write it as a new folder."""
    import sys

    from mergewell.engines.base import one_thread_a_worker
    from mergewell.errors import OutputError
    from mergewell.repair import checked_kind, repair_folder
    from mergewell.repair_step import RepairStep, step_parts

    wanted = checked_kind(kind)
    if out is None:
        raise OutputError("No output folder is named; add --out DIR.")
    inputs = {wanted: needed_data(data)}
    step = RepairStep.model_validate({**inputs, "samples": samples, "model_factory": model_factory})
    factory, batches = step_parts(step, str(folder))
    with one_thread_a_worker():
        manifest = repair_folder(folder, factory, batches, out, wanted, step=step)
    done: dict[str, Any] = manifest.model_dump(mode="json")["repair"]
    for warning in done["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if json:
        print_json({"version": 1, "folder": str(out), **done})
        return
    from mergewell.report.numbers import counted

    print(
        f"{out}: {counted(len(done['layers']), 'layer')} repaired on {done['samples']} samples, "
        f"{manifest.tensors_changed} of {manifest.tensors} tensors changed."
    )
    for name, reason in done["untouched"].items():
        print(f"  not {name}: {reason}")


def opened(
    base: str | None, experts: Sequence[str], model_factory: str | None
) -> tuple[Plan, ModuleSource]:
    """Return the plan of the experts' average, and where their architecture comes from.

    Raises:
        UserError: as `make_plan`; or no architecture is named.
    """
    from mergewell.cli.given import source_of
    from mergewell.flags import recipe_from_flags
    from mergewell.plan import make_plan

    recipe = recipe_from_flags(base=base, experts=experts, method="average", settings=[])
    planned = make_plan(recipe)
    return planned, source_of(planned.reference.path, model_factory, asked_by="running it")


def built(planned: Plan, source: ModuleSource) -> dict[str, Any]:
    """Return each expert's module by its short name."""
    from mergewell.check import build_module, short_names

    names = short_names(expert.path for expert in planned.recipe.experts)
    return {
        name: build_module(source.build, checkpoint)
        for name, checkpoint in zip(names, planned.experts, strict=True)
    }


def needed_data(data: str | None) -> str:
    """Return the path of the data.

    Raises:
        DataError: none is named.
    """
    from mergewell.errors import DataError

    if data is None:
        raise DataError(
            "No inputs are named; add --data PATH (.npz, .safetensors, .jsonl, folder)."
        )
    return data


def print_json(data: object) -> None:
    """Print plain data as JSON."""
    import json

    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


WAYS = {
    "single": "expert",
    "uniform_soup": "uniform soup",
    "logit_ensemble": "ensemble of logits",
    "feature_ensemble_first_head": "ensemble of features, first classifier",
    "feature_ensemble_mean_head": "ensemble of features, averaged classifier",
    "greedy_soup": "greedy soup",
    "greedy_soup_in_order": "greedy soup in the given order",
    "selected_logit_ensemble": "ensemble of logits of the greedy soup's experts",
    "selected_feature_ensemble": "ensemble of features of the greedy soup's experts",
}
"""The ways to combine experts, in words."""


def _print(found: Explanation) -> None:
    for sentence in found.sentences():
        print(sentence)
    against = "the labels" if found.labels == "given" else "the ensemble (no labels were given)"
    print(f"\nAnswers right against {against}, {found.samples} samples:")
    for variant in found.averaging.variants:
        value = variant.accuracy or variant.agreement
        name = (
            f"{WAYS[variant.way]} {variant.members[0] if variant.way == 'single' else ''}".strip()
        )
        note = " (BatchNorm re-estimated)" if variant.batch_norm == "reestimated" else ""
        print(
            f"  {100 * value.value:5.1f} % ({100 * value.low:.1f} to {100 * value.high:.1f})  "
            f"{name}{note}"
        )
    for way, reason in found.averaging.left_out.items():
        print(f"  not tried: {WAYS[way]}: {reason}")
