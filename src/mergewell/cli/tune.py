"""The command `tune`: arguments, and what it does and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergewell.cli.explain import Base, Experts, Factory, Json, opened, print_json

SHOWN = 10
"""Candidates that are printed."""


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
    search: Annotated[
        str,
        typer.Option(
            help="grid: spread candidates; line: golden section, one parameter after the other; "
            "optuna: all parameters at once, with --journal."
        ),
    ] = "grid",
    journal: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where Optuna keeps what it tried: goes on from there; processes share it.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="What to be near to: anchored (own expert and base, as sure as each is; as a "
            "rule), expert, ensemble, mix (of features, as a rule), answers."
        ),
    ] = None,
    outputs: Annotated[
        str, typer.Option(help="What the module gives: logits or features.")
    ] = "logits",
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Judge by it and not by a reference: labels (of the data; texts by perplexity), "
            "pkg.module:function of a module, or lm-eval:TASK[@DIR].",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stop once this many candidates gave nothing that can be told apart."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Inputs of each path of data.")] = 16,
    engine: Annotated[
        str, typer.Option(help="Where candidates are judged: here, or on a ray cluster.")
    ] = "here",
    seed: Annotated[int, typer.Option(help="Seed of the candidates and intervals.")] = 0,
    model_factory: Factory = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the recipe, as YAML.")
    ] = None,
    json: Json = False,
) -> None:
    """Choose a method and its parameters without labels, or by any metric."""
    from dataclasses import asdict

    from mergewell.cli.given import material_of
    from mergewell.cli.progress import steps
    from mergewell.engines.base import one_thread_a_worker
    from mergewell.errors import OutputError
    from mergewell.tune.given import METHODS, tune_given

    planned, source = opened(base, expert or [], model_factory)
    if out is not None and out.exists():
        raise OutputError(f"{out} exists already and nothing is overwritten; choose another name.")
    paths = data or []
    tasks, used = (), samples * max(1, len(paths))
    if metric is None:
        material, used = material_of(planned, source, paths, used)
        tasks = material.tasks
    with steps() as shown, one_thread_a_worker():
        tuned = tune_given(
            planned, source.build, tasks, methods=method or METHODS, budget=budget, search=search,
            journal=journal, engine=engine, reference=reference, outputs=outputs, metric=metric,
            data=paths, samples=samples, patience=patience, seed=seed, on_step=shown.update,
        )  # fmt: skip
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
                "reference": tuned.reference,
                "metric": tuned.metric,
                "outputs": outputs,
                "samples": used if metric is None else None,
                "candidates": rows,
                "regret": tuned.regret,
                "stopped": tuned.stopped,
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
