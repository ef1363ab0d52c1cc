"""BatchNorm repair: statistics measured anew on data, for merged models whose own do not fit.

An average of experts has activations of smaller variance than any expert's, so the averaged running
statistics are wrong for it. `reestimate` measures them; `models.repair` does the same for layers
that no BatchNorm follows. Experts that were trained with frozen statistics (eval mode) expect
exactly those: measuring them anew makes such models worse.

Shapes: N samples, C channels (nodes); a moment is [C] in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.errors import DataError, ModelError
from mergewell.models.dataflow import Batch, call, evaluating, parts
from mergewell.statistics.base import State, joined

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""The layers whose running statistics can be measured anew."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was repaired in a module, by name, and what was not."""

    layers: tuple[str, ...]
    """BatchNorms whose statistics are new, then layers whose weight and bias are."""

    untouched: Mapping[str, str]
    """Other layers of these kinds, with the reason."""


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorms that keep running statistics, by name."""
    return {
        name: part
        for name, part in parts(module)
        if isinstance(part, NORMS) and part.running_mean is not None
    }


def reestimate(
    module: nn.Module, batches: Iterable[Batch], *, momentum: float | None = None
) -> Repaired:
    """Replace the running mean and variance of every BatchNorm by those of the data, in place.

    Without `momentum` they are the mean and the unbiased variance over all samples and
    positions of all batches, summed in float64; with it, the exponential average over the batches
    in their order, from the stored values on, as torch's training mode makes it. Weights stay as
    they are, and so do all layers' train or eval modes.

    Source: Izmailov et al. 2018, arXiv:1803.05407, section 3.2; Jordan et al. 2023,
    arXiv:2211.08403 (RESET). Departures: variances are pooled over all samples, not averaged over
    batches. While measuring, each BatchNorm normalises by the batch at hand, so that later ones see
    repaired inputs: use batches of a hundred samples or more.

    Raises:
        ModelError: the module has no BatchNorm that keeps statistics.
        DataError: no batches, a batch with one value a channel, or values that are not finite.
    """
    norms = _required(module)
    if momentum is None:
        return set_moments(module, moments(module, batches))
    reached: set[str] = set()
    for state in moments_by_batch(module, batches):
        for name in _layers(state):
            _blend(norms[name], mean_of(state, name), variance_of(state, name, 1), momentum)
            reached.add(name)
    return _report(norms, reached)


def moments(module: nn.Module, batches: Iterable[Batch]) -> State:
    """Return what each BatchNorm sees: `NAME:count`, `NAME:sum` and `NAME:squares`.

    A state of sums: `statistics.base.joined` makes one of the states of parts of the data.

    Raises:
        ModelError, DataError: as `reestimate`.
    """
    _required(module)
    total: State = {}
    for state in moments_by_batch(module, batches):
        total = joined(total, state)
    return total


def set_moments(module: nn.Module, state: State) -> Repaired:
    """Write the mean and unbiased variance of `moments` into the module's BatchNorms.

    Raises:
        ModelError: the module has no BatchNorm that keeps statistics.
    """
    norms, reached = _required(module), set(_layers(state))
    for name in reached:
        _blend(norms[name], mean_of(state, name), variance_of(state, name, 1), 1.0)
    return _report(norms, reached)


def _required(module: nn.Module) -> dict[str, nn.Module]:
    norms = batch_norms(module)
    if not norms:
        raise ModelError(
            f"{type(module).__name__} has no BatchNorm with running statistics, so there is "
            "nothing to re-estimate; use it as it is (or repair of kind 'repair')."
        )
    return norms


def _report(norms: Mapping[str, nn.Module], reached: Iterable[str]) -> Repaired:
    done = set(reached)
    left = dict.fromkeys([n for n in norms if n not in done], "not reached by the forward pass")
    return Repaired(tuple(name for name in norms if name in done), left)


def moments_by_batch(module: nn.Module, batches: Iterable[Batch]) -> Iterator[State]:
    """Run a module with its BatchNorms on each batch's own statistics; yield the sums of each.

    Raises:
        DataError: as `reestimate`.
    """
    norms = batch_norms(module)
    state: State = {}
    done = 0

    def watch(name: str) -> Callable[..., None]:
        def hook(_part: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal state
            state = joined(state, channel_sums(name, args[0], 1))

        return hook

    with evaluating([module]), _by_batch(norms.values()), ExitStack() as hooks:
        for name, part in norms.items():
            hooks.callback(part.register_forward_pre_hook(watch(name)).remove)
        for batch in batches:
            state = {}
            call(module, batch)
            done += 1
            yield state
    if not done:
        raise DataError("There are no batches to measure statistics on; give some data.")


@contextmanager
def _by_batch(norms: Iterable[nn.Module]) -> Generator[None]:
    """Let BatchNorms normalise by the batch while their stored statistics stay as they are."""
    held: list[tuple[Any, bool, bool]] = [
        (norm, norm.training, bool(norm.track_running_stats)) for norm in norms
    ]
    try:
        for norm, _, _ in held:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm, training, tracking in held:
            norm.training, norm.track_running_stats = training, tracking


def channel_sums(name: str, values: Tensor, dim: int) -> State:
    """Return count, sum and sum of squares of each channel along all other dimensions.

    Raises:
        DataError: one value a channel, or values that are not finite.
    """
    rows = values.detach().movedim(dim, 0).flatten(1).double()
    if rows.shape[1] < 2:
        raise DataError(
            f"Layer {name} gets one value a channel from a batch, which has no variance; "
            "give batches of two samples or more."
        )
    if not bool(rows.isfinite().all()):
        raise DataError(
            f"Layer {name} sees values that are not finite (NaN or infinite) on the data; check "
            "the model and the data for values out of range."
        )
    count = torch.tensor(float(rows.shape[1]), dtype=torch.float64)
    sums = {"count": count, "sum": rows.sum(1), "squares": rows.square().sum(1)}
    return {f"{name}:{key}": value for key, value in sums.items()}


def layer_of(key: str) -> str:
    """Return the layer's name of a key of `moments`."""
    return key.rpartition(":")[0]


def _layers(state: State) -> list[str]:
    return list(dict.fromkeys(layer_of(key) for key in state))


def mean_of(state: State, name: str) -> Tensor:
    """Return the mean of each channel of a layer, [C]."""
    return state[f"{name}:sum"] / state[f"{name}:count"]


def variance_of(state: State, name: str, correction: int) -> Tensor:
    """Return the variance of each channel, [C]; a `correction` of 1 makes it unbiased."""
    count, mean = state[f"{name}:count"], mean_of(state, name)
    spread = (state[f"{name}:squares"] / count - mean.square()).clamp(min=0)
    return spread * count / (count - correction)


def _blend(norm: Any, mean: Tensor, variance: Tensor, momentum: float) -> None:
    """Move running statistics towards new ones; a momentum of 1 replaces them."""
    with torch.no_grad():
        for buffer, new in ((norm.running_mean, mean), (norm.running_var, variance)):
            buffer.copy_((1 - momentum) * buffer.double() + momentum * new.to(buffer.device))
