"""The search: candidates are judged until all are, or until they cannot be told apart.

Shapes: M candidates, R resamples, N inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from torch import nn

from mergewell.errors import RecipeError
from mergewell.evaluate import Estimate, estimate, resampled_means
from mergewell.recipe import Recipe
from mergewell.tune.objective import Losses, Objective
from mergewell.tune.space import Candidate
from mergewell.tune.strategy import Grid, Strategy
from mergewell.tune.trying import Judge, chosen, judge_here

OnStep = Callable[[str, int, int], None]


Judging = Callable[[Recipe, Objective, Callable[[], nn.Module]], AbstractContextManager[Judge]]
"""Where candidates are judged: `trying.judge_here`, or `on_ray.judge_on_ray`."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate and what its merge costs on average, each task counting the same."""

    candidate: Candidate
    divergence: Estimate


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `tune` found."""

    recipe: Recipe
    tried: tuple[Tried, ...]
    """All candidates that were judged, the best first."""

    regret: float
    """Mean gain in divergence that the best candidate of a resample of the inputs has over the
    chosen one; it knows nothing of settings that were not tried."""

    stopped: str | None = None
    """Why not all candidates were tried, in a sentence."""

    reference: str | None = None
    """What candidates were to be near to, where that judged them; named by `tune_given`."""

    metric: str | None = None
    """The metric that judged them, if one did."""


def tune(
    recipe: Recipe,
    tried: Sequence[Candidate] | Strategy,
    objective: Objective,
    factory: Callable[[], nn.Module],
    *,
    seed: int = 0,
    patience: int | None = None,
    metric: str | None = None,
    judging: Judging = judge_here,
    on_step: OnStep | None = None,
) -> Tuned:
    """Return the recipe with the method that costs least, and what was tried.

    With a `patience` of P it ends early, once every method has been tried and the best of all is
    within one standard error of the best of all but the last P. `metric` names what the objective
    measures where that is no reference; its costs are the metric's negative.

    Raises:
        RecipeError: no base where scales are searched, or no candidate.
        UserError: as `make_plan`, `merge_tensors`, `load_state` and `Objective.losses`.
    """
    strategy = tried if isinstance(tried, Strategy) else Grid(tried)
    with judging(recipe, objective, factory) as judge:
        stopped = _try_all(strategy, judge, patience, on_step)
    done = strategy.done()
    losses = [each for _, each in done]
    values = np.array([_mean(one) for one in losses])
    draws = np.mean(
        [
            resampled_means(np.stack(rows), seed=seed + place)
            for place, rows in enumerate(zip(*losses, strict=True))
        ],
        axis=0,
    )
    order = [int(place) for place in np.argsort(values, kind="stable")]
    best = order[0]
    regret = float((draws[:, best] - draws.min(1)).mean())
    inputs = sum(len(task) for task in losses[0])
    how = (
        f"without labels among {len(done)} candidates on {inputs} inputs: divergence "
        f"{values[best]:.4g}, estimated regret {regret:.2g}."
        if metric is None
        else f"among {len(done)} candidates by the metric {metric}, whose negative "
        f"{values[best]:.4g} is on the samples that chose it: it flatters."
    )
    notes = [f"Chosen by `mergewell tune` {how}", *([stopped] if stopped is not None else [])]
    made = chosen(recipe, done[best][0])
    return Tuned(
        made.model_copy(update={"notes": (*made.notes, " ".join(notes))}),
        tuple(Tried(done[i][0], estimate(float(values[i]), draws[:, i])) for i in order),
        regret,
        stopped,
        metric=metric,
    )


def _try_all(
    strategy: Strategy, judge: Judge, patience: int | None, on_step: OnStep | None
) -> str | None:
    """Try what the strategy asks for; return why that ended early, if it did."""
    if patience is not None and patience < 1:
        raise RecipeError(f"A patience of {patience} ends before it begins; give at least 1.")
    while asked := strategy.ask():
        for candidate, losses in judge(asked):
            strategy.tell(candidate, losses)
            done = strategy.done()
            if on_step is not None:
                on_step("candidates", len(done), strategy.total)
            seen = {one.method for one, _ in done}
            if patience is not None and len(done) < strategy.total and seen >= strategy.methods:
                why = no_gain([each for _, each in done], patience)
                if why is not None:
                    return f"Stopped after {len(done)} of {strategy.total}: {why}"
    return None


def no_gain(done: Sequence[Losses], patience: int) -> str | None:
    """Return why another candidate will hardly pay, if the last ones, `patience` many, did not.

    The gain is paired by input; its standard error takes the inputs as drawn at random, by task.
    """
    if len(done) <= patience:
        return None
    values = [_mean(one) for one in done]
    order = np.argsort(values, kind="stable")
    before = int(np.argmin(values[:-patience]))
    gain, error = _gain(done[before], done[int(order[0])])
    if gain > error:
        return None
    apart, error = _gain(done[int(order[1])], done[int(order[0])])
    return (
        f"best and second within {apart:.2g} (standard error {error:.2g}), and the last {patience} "
        "gave nothing that these inputs tell apart."
    )


def _gain(worse: Losses, better: Losses) -> tuple[float, float]:
    """Return how much less the second costs, and the standard error of that."""
    gains = [one - two for one, two in zip(worse, better, strict=True)]
    squares = [each.var(ddof=1) / len(each) if len(each) > 1 else 0.0 for each in gains]
    error = float(np.sqrt(np.sum(squares))) / len(gains)
    return float(np.mean([each.mean() for each in gains])), error


def _mean(losses: Losses) -> float:
    return float(np.mean([task.mean() for task in losses]))
