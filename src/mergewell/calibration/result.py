"""Calibration: what a walk over the data found, as states that can be joined, and their values.

Shapes: K experts; P = K + 2 models: the base, the experts, the merged model; N samples, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mergewell.errors import DataError
from mergewell.models.capture import LayerMLoss, finished
from mergewell.models.units import Unit
from mergewell.statistics.activation_cka import linear_cka
from mergewell.statistics.activation_drift import ActivationDrift
from mergewell.statistics.activation_features import ActivationFeatures
from mergewell.statistics.activation_gram import ActivationGram
from mergewell.statistics.activation_moments import ActivationMoments
from mergewell.statistics.base import State, Statistic
from mergewell.statistics.fisher import Fisher
from mergewell.statistics.m_loss import MLoss
from mergewell.tensor_group import Value

FAMILIES: Mapping[str, Statistic[Any]] = {
    "m_loss": MLoss(),
    "moments": ActivationMoments(),
    "drift": ActivationDrift(),
    "features": ActivationFeatures(),
    "gram": ActivationGram(),
    "fisher": Fisher(),
    "output": ActivationDrift(),
    "outputs": ActivationFeatures(),
}
"""The statistics of a calibration; their states' keys are FAMILY/PLACE."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model that was run."""

    name: str
    """`base`, `expert 1`, ..., `merged`."""

    path: str
    digest: str
    """See `data.digest`; of the merged model, of what it was merged by."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a calibration is of; two that differ here, but for the batches, cannot be joined."""

    data: str
    """Fingerprint of all the data."""

    samples: int
    """Samples in all the data."""

    batches: int
    """Batches in all the data."""

    mode: str
    coefficients: tuple[float, ...]
    """The experts' shares in the ensemble, on the simplex, [K]."""

    models: tuple[Model, ...]
    units: tuple[Unit, ...]
    """Where M-Loss was measured, in forward order."""

    blocks: tuple[str, ...]
    """Blocks whose outputs were compared, in forward order."""

    uncovered: Mapping[str, str]
    """Names of what M-Loss, or the comparison of blocks, left out, with the reasons."""

    owners: tuple[int, ...] = ()
    """Of which expert's task each batch is, from 0; none where all are of all."""

    grams: Mapping[str, int] = field(default_factory=dict[str, int])
    """Modules whose inputs' Gram matrices were made, and the dimension of their weight that counts
    the inputs."""

    forward: str = ""
    """By what method the layers before were merged when a layer's Gram matrices were made; nothing
    where each expert was on its own path."""

    fisher: str = ""
    """How outputs were read for the Fisher information; nothing where none was gathered."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found on some or all batches of the data."""

    head: Head
    done: frozenset[int]
    """Numbers of the batches that were run."""

    seen: int
    """Samples in them."""

    states: Mapping[str, State]
    """States of the statistics by FAMILY/PLACE."""

    @property
    def m_loss(self) -> tuple[LayerMLoss, ...]:
        """M-Loss of every unit, in forward order.

        Raises:
            DataError: activations were not finite.
        """
        return tuple(finished(unit, self.states[f"m_loss/{unit.name}"]) for unit in self.head.units)

    @property
    def output_gap(self) -> float:
        """Distance of the merged model's output from the ensemble's, a fraction of the latter."""
        return float(self.value("output", "")["merged"])

    @property
    def outputs(self) -> Tensor | None:
        """Outputs of all models, [P, N, C]; None where they are not one vector a sample."""
        return self.value("outputs", "")["features"] if "outputs/" in self.states else None

    @property
    def features(self) -> dict[str, Tensor]:
        """Pooled output of each block, every model on its own path, [P, N, D], in forward order."""
        return {block: self.value("features", block)["features"] for block in self.head.blocks}

    @property
    def cka(self) -> dict[str, Tensor]:
        """CKA of every two models at each block, [P, P]; nan where features do not vary.

        Raises:
            DataError: there are too few samples.
        """
        return {block: linear_cka(models) for block, models in self.features.items()}

    @property
    def drift(self) -> dict[str, Value]:
        """Drift at each block, see `ActivationDrift.value`."""
        return {block: self.value("drift", block) for block in self.head.blocks}

    def value(self, family: str, place: str) -> Value:
        """Return the value of one statistic at one place.

        Raises:
            DataError: it was not gathered there.
        """
        state = self.states.get(f"{family}/{place}")
        if state is None:
            raise DataError(
                f"The calibration holds no {family} of {place or 'the output'}; calibrate again, "
                "with what gathers it."
            )
        return FAMILIES[family].value(state)

    def join(
        self, other: Calibration, *, names: Sequence[str] = ("one", "the other")
    ) -> Calibration:
        """Return both calibrations as one, as if all their batches had been run together.

        `names` is what an error calls the two.

        Raises:
            DataError: they are of other data, models or settings, or share batches.
        """
        for what, look in _SAME.items():
            if look(self.head) != look(other.head):
                raise DataError(
                    f"{names[0]} and {names[1]} are calibrations of different {what}; join only "
                    "shards of one calibration."
                )
        both = self.done & other.done
        if both:
            raise DataError(
                f"{names[0]} and {names[1]} both hold batch {min(both)} of the data "
                f"({len(both)} batches in all); join shards that do not overlap."
            )
        strange_keys = self.states.keys() ^ other.states.keys()
        if self.head.grams == other.head.grams:  # a shard may hold no batch of some expert's task
            own = ("gram/", "fisher/")
            strange_keys = {key for key in strange_keys if not key.startswith(own)}
        if strange_keys:
            strange = min(strange_keys)
            raise DataError(
                f"Of {names[0]} and {names[1]} only one holds {strange}; make both with the same "
                "flags."
            )
        states = {
            key: FAMILIES[key.partition("/")[0]].join(
                self.states.get(key, {}), other.states.get(key, {})
            )
            for key in {**self.states, **other.states}
        }
        done, seen = self.done | other.done, self.seen + other.seen
        return replace(self, done=done, seen=seen, states=states)


_SAME: Mapping[str, Callable[[Head], object]] = {
    "data": lambda head: (head.data, head.samples, head.batches),
    "modes": lambda head: head.mode,
    "models": lambda head: [(model.name, model.digest) for model in head.models],
    "coefficients": lambda head: head.coefficients,
    "units": lambda head: [unit.name for unit in head.units],
    "blocks": lambda head: head.blocks,
    "owners of batches": lambda head: head.owners,
    "Fisher information": lambda head: head.fisher,
}
