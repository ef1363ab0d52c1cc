"""The command `partners`: arguments, and what it does and prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergewell.cli.explain import Base, Experts, Factory, Json, opened, print_json

if TYPE_CHECKING:
    from mergewell.models.loader import ModuleSource
    from mergewell.plan import Plan

TOLERANCE = 0.01
"""Share of answers that one expert more must cost at least to be told of."""


def partners(
    base: Base = None,
    expert: Experts = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Unlabelled inputs of each expert's task, in order."),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Inputs of each path of data.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of groups and intervals.")] = 0,
    model_factory: Factory = None,
    json: Json = False,
) -> None:
    """Say which experts to merge, and how many (kinship alone without --data)."""
    from itertools import combinations

    from mergewell.check import short_names
    from mergewell.flags import recipe_from_flags
    from mergewell.partners.greedy import SATURATED
    from mergewell.partners.measure import correlation, covariance
    from mergewell.plan import make_plan

    recipe = recipe_from_flags(base=base, experts=expert or [], method="average", settings=[])
    planned = make_plan(recipe)
    kinship = correlation(covariance(planned))
    names = list(short_names(each.path for each in recipe.experts))
    found: dict[str, Any] = {
        "version": 1, "experts": [each.path for each in recipe.experts],
        "kinship": kinship.tolist(), "groups": [], "measured": [], "scaling": None,
    }  # fmt: skip
    lines = [
        f"kinship {kinship[i, j]:6.2f}  {names[i]} + {names[j]}"
        + ("  (nearly one model: merging changes little)" if kinship[i, j] > SATURATED else "")
        for i, j in sorted(combinations(range(len(names)), 2), key=lambda pair: kinship[pair])
    ]
    if data:
        planned, source = opened(base, expert or [], model_factory)
        more, told = _measured(planned, source, data, samples, seed)
        found |= more
        lines += told
    if json:
        print_json(found)
        return
    print("\n".join(lines))


def _measured(
    planned: Plan, source: ModuleSource, paths: list[str], samples: int, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Return what inputs tell, as data and as lines."""
    from dataclasses import asdict

    from mergewell.check import short_names
    from mergewell.cli.given import material_of
    from mergewell.cli.progress import steps
    from mergewell.engines.base import one_thread_a_worker
    from mergewell.partners.groups import best_groups
    from mergewell.partners.law import POINTS, scaling
    from mergewell.partners.measure import groups_to_measure, measure, pairs_of, points_of

    names = list(short_names(each.path for each in planned.recipe.experts))
    material, _ = material_of(planned, source, paths, samples * len(paths))
    with steps() as shown, one_thread_a_worker():
        kept = measure(
            planned.recipe, groups_to_measure(len(names), seed=seed), material.tasks, source.build,
            on_step=shown.update,
        )  # fmt: skip
    groups = best_groups(pairs_of(kept, len(names)))
    lines = [
        f"{len(group.members)} experts: {' + '.join(names[i] for i in group.members)}, "
        f"{100 * group.quality:.0f} % of answers kept"
        + (" (measured)" if len(group.members) == 2 else " (mean of their pairs)")
        for group in groups
    ]
    points = points_of(kept)
    law = None
    if len(points) == POINTS:
        law = scaling(points, tolerance=TOLERANCE, seed=seed)
        lines += [
            f"{k} experts keep {100 * y:.0f} ± {196 * e:.0f} % on average" for k, y, e in points
        ]
        if law.low is None:
            lines.append(
                "How many pay cannot be said: the three points do not settle a scaling law; give "
                "more inputs."
            )
        else:
            lines.append(
                f"Beyond {law.enough} experts ({law.low} to {law.high}) one more changes at most "
                f"{100 * TOLERANCE:.0f} % of answers."
            )
    return {
        "groups": [asdict(group) for group in groups],
        "measured": [asdict(each) for each in kept],
        "scaling": None if law is None else asdict(law),
    }, lines
