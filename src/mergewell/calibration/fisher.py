"""The Fisher information of the base and the experts, gathered model by model after the walk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mergewell.calibration.data import Data
from mergewell.models.fisher import Likelihood, squared_gradients
from mergewell.models.skeleton import Skeleton
from mergewell.statistics.base import State
from mergewell.statistics.fisher import Fisher, SquaredGradients


def gather_fisher(
    models: Mapping[str, Skeleton],
    data: Data,
    likelihood: Likelihood,
    *,
    wanted: Mapping[str, Sequence[int]],
    starts: Sequence[int],
    on_batch: Callable[[], object] | None = None,
) -> dict[str, State]:
    """Return the states by fisher/PARAMETER/MODEL.

    `wanted` are the numbers of the batches that each model is run on, `starts` the numbers of the
    batches' first samples. One model at a time is in memory, whole, with a gradient and what a
    backward pass of one sample takes.

    Raises:
        DataError: gradients are not finite.
        ModelError: a model has no parameter.
    """
    statistic = Fisher()
    states: dict[str, State] = {}
    for model, numbers in wanted.items():
        skeleton = models[model]
        try:
            skeleton.load([""])
            for number in numbers:
                batch = data.batches[number]
                found = squared_gradients(skeleton.module, batch, likelihood, first=starts[number])
                for name, squares in found.items():
                    key = f"fisher/{name}/{model}"
                    added = SquaredGradients(squares, data.samples_in(number))
                    states[key] = statistic.update(states.get(key, {}), added)
                if on_batch is not None:
                    on_batch()
        finally:
            skeleton.release()
    return states
