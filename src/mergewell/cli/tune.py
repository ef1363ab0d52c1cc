"""The command `tune`: arguments, and what it does and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergewell.cli.explain import Base, Experts, Factory, Json, opened, print_json

SHOWN = 10
"""Candidates that are printed."""

DEFAULT = ("task_arithmetic", "ties", "tsv", "iso_c")
"""Methods that are tried unless some are named."""


def tune(
    base: Base = None,
    expert: Experts = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Unlabelled inputs; once, or once an expert."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method to try; repeat. A few if absent.")
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Candidates of each method.")] = 10,
    reference: Annotated[
        str | None,
        typer.Option(
            help="What to be near to: expert, ensemble, mix, or answers: mix and the own expert's "
            "answers (as a rule; mix of features)."
        ),
    ] = None,
    outputs: Annotated[
        str, typer.Option(help="What the module gives: logits or features.")
    ] = "logits",
    samples: Annotated[int, typer.Option(min=2, help="Inputs of each path of data.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the candidates and intervals.")] = 0,
    model_factory: Factory = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the recipe, as YAML.")
    ] = None,
    json: Json = False,
) -> None:
    """Choose a method and its parameters without labels."""
    from dataclasses import asdict
    from typing import cast, get_args

    from mergewell.cli.learn import _material  # pyright: ignore[reportPrivateUsage]
    from mergewell.cli.progress import steps
    from mergewell.engines.base import one_thread_a_worker
    from mergewell.errors import OutputError, RecipeError, did_you_mean
    from mergewell.tune.objective import Outputs, Reference, make_objective
    from mergewell.tune.search import tune as search
    from mergewell.tune.space import candidates

    reference = reference or ("mix" if outputs == "features" else "answers")
    for flag, given, known in (("reference", reference, Reference), ("outputs", outputs, Outputs)):
        if given not in get_args(known):
            raise RecipeError(f"--{flag} {given}: {did_you_mean(given, get_args(known))}")
    tried = candidates(method or DEFAULT, budget=budget, seed=seed)
    planned, source = opened(base, expert or [], model_factory)
    if out is not None and out.exists():
        raise OutputError(f"{out} exists already and nothing is overwritten; choose another name.")
    paths = data or []
    material, used = _material(planned, source, paths, samples * max(1, len(paths)))
    with steps() as shown, one_thread_a_worker():
        objective = make_objective(
            cast("Reference", reference), cast("Outputs", outputs), material.tasks, planned,
            source.build,
        )  # fmt: skip
        tuned = search(
            planned.recipe, tried, objective, source.build, seed=seed, on_step=shown.update
        )
    text = tuned.recipe.to_yaml()
    if out is not None:
        from mergewell.report.results import write_text

        write_text(out, text)
    if json:
        rows = [
            {"method": each.candidate.choice, "divergence": asdict(each.divergence)}
            for each in tuned.tried
        ]
        print_json(
            {
                "version": 1,
                "reference": reference,
                "outputs": outputs,
                "samples": used,
                "candidates": rows,
                "regret": tuned.regret,
                "recipe": tuned.recipe.as_data(),
            }
        )
        return
    for each in tuned.tried[:SHOWN]:
        value = each.divergence
        settings = {k: v for k, v in each.candidate.choice.items() if k != "name"}
        shown_settings = " ".join(f"{k}={v}" for k, v in settings.items())
        print(
            f"{value.value:9.4g} ({value.low:.4g} to {value.high:.4g})  "
            f"{each.candidate.method} {shown_settings}".rstrip()
        )
    print(tuned.recipe.notes[-1])
    print(text if out is None else f"{out}: the recipe; merge it with `mergewell merge {out}`.")
