"""What to expect of merging a plan's experts, by several methods: before any file is written.

Shapes: K experts, M = K + 1 vectors, the base first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.calibration.data import Data
from mergewell.descent.tasks import LearningTask, by_input
from mergewell.models.dataflow import Batch, tensors
from mergewell.models.loader import load_state
from mergewell.plan import Plan, make_plan
from mergewell.prediction.alone import alone, beyond
from mergewell.prediction.answers import answers
from mergewell.prediction.lie import lie, products
from mergewell.prediction.look import Seen, look
from mergewell.prediction.predictor import LEVEL, Budget, Predicted, shipped
from mergewell.prediction.resemblance import resemblance
from mergewell.recipe import make_recipe
from mergewell.run import merge_tensors

State = Mapping[str, Tensor]
OnStep = Callable[[str, int, int], None]

METHODS: tuple[Mapping[str, Any], ...] = (
    {"name": "average"},
    {"name": "task_arithmetic", "scale": 0.3},
    {"name": "ties", "density": 0.2, "scale": 1.0},
    {"name": "tsv", "scale": 1.0},
    {"name": "iso_c", "scale": 1.0},
)
"""What is compared unless the caller says otherwise; none was chosen on the atlas."""

LINEAR = {"average": None, "task_arithmetic": "scale"}
"""Methods whose merge follows from inner products of the task vectors alone."""

INPUTS = 16
"""Inputs of each task that are looked at: the number that the predictor was fitted with."""

ROWS = 256
"""Answers of a task that are compared, evenly over all positions, where an input has many."""

WORTH = 0.02
"""Gain in mean retention from which leaving an expert out is worth a word."""


@dataclass(frozen=True, slots=True)
class _Read:
    """What is kept of one model and task: features [N, D], answers [R, C], and these by input."""

    last: Tensor
    middle: Tensor
    answers: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, task: LearningTask, seen: Seen) -> _Read:
        """Read the logits; a language model has one answer a position, of which some are kept."""
        parts = [task.read(output, b) for output, b in zip(seen.outputs, task.batches, strict=True)]
        pooled = [by_input(part, b) for part, b in zip(parts, task.batches, strict=True)]
        rows = torch.cat(parts)
        if len(rows) > ROWS:
            rows = rows[torch.linspace(0, len(rows) - 1, ROWS).long()]
        return cls(seen.last, seen.middle, rows, torch.cat(pooled))


@dataclass(frozen=True, slots=True)
class Expected:
    """One way to merge, and what is expected of it."""

    method: Mapping[str, Any]
    predicted: Predicted


@dataclass(frozen=True, slots=True)
class Dropped:
    """An expert without which the others would keep more."""

    expert: str
    gain: float
    """In mean retention of the others."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What to expect of merging some experts."""

    budget: Budget
    experts: tuple[str, ...]
    merges: tuple[Expected, ...]
    """The best first."""

    drop: Dropped | None
    sizes: tuple[tuple[tuple[str, ...], float], ...]
    """For K experts, K - 1, ... 2: which an average is best of, and its mean retention."""

    alarms: Mapping[str, tuple[str, ...]]
    """Experts that look unfit to be merged with the others, and the features that say so."""

    @property
    def best(self) -> Expected:
        """The merge of which most is expected."""
        return self.merges[0]

    def as_data(self) -> dict[str, Any]:
        """Return everything as the contract of `check --json` has it."""
        facts = shipped(self.budget).facts
        return {
            "level": LEVEL,
            "budget": self.budget,
            "merges": [
                {
                    "method": dict(each.method),
                    "mean": asdict(each.predicted.mean),
                    "experts": {
                        name: asdict(one)
                        for name, one in zip(self.experts, each.predicted.experts, strict=True)
                    },
                    "outside": list(each.predicted.outside),
                }
                for each in self.merges
            ],
            "drop": asdict(self.drop) if self.drop else None,
            "sizes": [{"experts": list(names), "mean": mean} for names, mean in self.sizes],
            "alarms": {name: list(why) for name, why in self.alarms.items()},
            "fitted_to": {key: facts[key] for key in ("merges", "experts", "bases", "tasks")},
            "points": facts.get("points", []),
        }


def predict_by_weights(
    total: Tensor, names: Sequence[str], coefficients: Sequence[float] | None = None
) -> Prediction:
    """Return what inner products of the base and the task vectors, [M, M], let expect.

    Only linear merges follow from these: the average, and the sum at a scale of 0.3.
    """
    shares = [1.0] * len(names) if coefficients is None else coefficients
    merges = [
        Expected(method, _linear(total, shares, method))
        for method in METHODS
        if method["name"] in LINEAR
    ]
    return _prediction("weights", names, merges, total)


def predict_by_inputs(
    plan: Plan,
    names: Sequence[str],
    tasks: Sequence[LearningTask],
    factory: Callable[[], nn.Module],
    *,
    methods: Sequence[Mapping[str, Any]] = METHODS,
    on_step: OnStep | None = None,
) -> Prediction:
    """Return what the answers to a few unlabelled inputs of each expert's task let expect.

    Each method's merge is made in memory, which has to hold K + 2 models, and run on all inputs.
    `tasks` are those of the experts, in their order; the module gives logits.

    Raises:
        UserError: as `make_plan`, `merge_tensors` and `load_state`.
    """
    assert plan.base is not None
    module = factory()
    base = {name: plan.base[name] for name in plan.base}
    states = [{name: one[name] for name in one} for one in plan.experts]
    count = 2 * len(states) + 1 + len(methods)
    done = 0

    def seen(state: State, asked: Sequence[LearningTask]) -> list[_Read]:
        nonlocal done
        load_state(module, state)
        found = [_Read.of(task, look(module, task.batches)) for task in asked]
        done += 1
        if on_step is not None:
            on_step("prediction", done, count)
        return found

    own = [seen(state, tasks) for state in (base, *states)]
    apart = [
        _apart(own[0][place], own[place + 1][place], *seen(beyond(base, state), [task]))
        for place, (task, state) in enumerate(zip(tasks, states, strict=True))
    ]
    merges: list[Expected] = []
    total = torch.zeros(())
    for method in methods:
        recipe = make_recipe({**plan.recipe.as_data(), "method": dict(method), "dtype": "float32"})
        merged = {**base, **dict(merge_tensors(make_plan(recipe)))}
        total = products(base, states, merged)
        numbers, each = lie(total)
        ours = seen(merged, tasks)
        rows = [
            numbers
            | {name: values[place] for name, values in each.items()}
            | apart[place]
            | _answered([*(one[place] for one in own), ours[place]], place)
            for place in range(len(tasks))
        ]
        merges.append(Expected(method, shipped("unlabelled")(rows)))
    return _prediction("unlabelled", names, merges, total[:-1, :-1])


def own_tasks(data: Data, inputs: int = INPUTS) -> list[LearningTask]:
    """Return some inputs of each expert's task, from all of its batches, in the experts' order."""
    numbers: dict[int, list[int]] = {}
    for number, owner in enumerate(data.owners):
        numbers.setdefault(owner, []).append(number)
    return [
        LearningTask(owner, _evenly([data.batches[number] for number in own], inputs))
        for owner, own in sorted(numbers.items())
    ]


def _evenly(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Return `count` samples at even distances, or all: batches may be sorted by length."""
    sizes = [len(tensors(batch)[0]) for batch in batches]
    total, first = sum(sizes), 0
    count = min(count, total)
    wanted = {index * total // count for index in range(count)}
    taken: list[Batch] = []
    for batch, size in zip(batches, sizes, strict=True):
        rows = torch.tensor([place for place in range(size) if first + place in wanted])
        if len(rows):
            named = {"": batch} if isinstance(batch, Tensor) else batch
            picked = {name: tensor[rows] for name, tensor in named.items()}
            taken.append(picked[""] if isinstance(batch, Tensor) else picked)
        first += size
    return taken


def _answered(models: Sequence[_Read], place: int) -> dict[str, float]:
    base, *experts, merged = [one.answers for one in models]
    return answers(base, experts, merged, expert=place) | resemblance(
        [one.last for one in models],
        [one.middle for one in models],
        [one.pooled for one in models[1:-1]],
        expert=place,
    )


def _apart(base: _Read, own: _Read, further: _Read) -> dict[str, float]:
    return alone(base.last, own.last, further.last, said=own.answers, said_further=further.answers)


def _prediction(
    budget: Budget, names: Sequence[str], merges: Sequence[Expected], total: Tensor
) -> Prediction:
    ordered = tuple(sorted(merges, key=lambda each: -each.predicted.mean.value))
    return Prediction(
        budget,
        tuple(names),
        ordered,
        _drop(names, total),
        _sizes(names, total),
        {name: why for name, why in zip(names, merges[0].predicted.alarms, strict=True) if why},
    )


def _linear(total: Tensor, coefficients: Sequence[float], method: Mapping[str, Any]) -> Predicted:
    """Return what is expected of an average or a scaled sum, from inner products alone."""
    weights = torch.tensor(coefficients, dtype=torch.float64)
    scale = method.get("scale", 1 / max(float(weights.sum()), 1e-12))
    count = len(weights)
    numbers, each = lie(lifted(total, (scale * weights).tolist()))
    rows = [numbers | {name: v[k] for name, v in each.items()} for k in range(count)]
    return shipped("weights")(rows)


def lifted(total: Tensor, weights: Sequence[float]) -> Tensor:
    """Return inner products [M, M] with those of a weighted sum of the task vectors beside them."""
    lift = torch.zeros(len(total) + 1, len(total), dtype=torch.float64)
    lift[:-1] = torch.eye(len(total))
    lift[-1, 1:] = torch.tensor(weights, dtype=torch.float64)
    return lift @ total.double() @ lift.T


def _averaged(total: Tensor, kept: Sequence[int]) -> Predicted:
    places = torch.tensor([0, *(k + 1 for k in kept)])
    return _linear(total[places][:, places], [1.0] * len(kept), METHODS[0])


def _drop(names: Sequence[str], total: Tensor) -> Dropped | None:
    """Return the expert whose absence helps the others' average most, if it does."""
    count = len(names)
    if count < 3:
        return None
    whole = [one.value for one in _averaged(total, range(count)).experts]
    gains = [
        _averaged(total, [k for k in range(count) if k != out]).mean.value
        - sum(v for k, v in enumerate(whole) if k != out) / (count - 1)
        for out in range(count)
    ]
    best = max(range(count), key=gains.__getitem__)
    return Dropped(names[best], gains[best]) if gains[best] >= WORTH else None


def _sizes(names: Sequence[str], total: Tensor) -> tuple[tuple[tuple[str, ...], float], ...]:
    """Return the best average of each size, found by leaving out one expert after another."""
    kept: list[int] = list(range(len(names)))
    found = [(tuple(names), _averaged(total, kept).mean.value)]
    while len(kept) > 2:
        tries: list[list[int]] = [[k for k in kept if k != out] for out in kept]
        values = [_averaged(total, one).mean.value for one in tries]
        best = max(range(len(tries)), key=values.__getitem__)
        kept = tries[best]
        found.append((tuple(names[k] for k in kept), values[best]))
    return tuple(found)
