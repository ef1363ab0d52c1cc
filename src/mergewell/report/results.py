"""Results: what a check or a demo found, as the frozen contract of `results.json`.

Everything is plain data: reading, writing and drawing need neither torch nor the models. Fractions
are in [0, 1] unless said otherwise; fields that this version does not know are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic import model_validator as validator

from mergewell.errors import DataError
from mergewell.report.files import read_object, sentence, write_text

RESULTS_FILE = "results.json"
MEAN = "mean"
"""The key under which an interval of the mean over tasks may stand."""

Level = Literal["good", "fair", "poor"]
Kind = Literal["activation", "gated", "attention", "norm", "block", "output"]
"""What a row of M-Loss is of: `mergewell.models.units` explains the kinds."""

WHOLES: tuple[Kind, ...] = ("block", "output")
"""Kinds that hold others: their M-Loss is what the parts inside add up to."""

Share = Annotated[float, Field(ge=0, le=1)]
Loss = Annotated[float, Field(ge=0)]
Matrix = tuple[tuple[float | None, ...], ...]
"""Rows of numbers; null where a value is not defined."""


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError("the low end is above the high end")
    return interval


def _plain_file_name(name: str) -> str:
    if not name or name in (".", "..") or any(mark in name for mark in "/\\\0"):
        raise ValueError("a plain file name is wanted, without a folder")
    return name


Interval = Annotated[tuple[Share, Share], AfterValidator(_ordered)]
"""Low and high end of a 95 % bootstrap interval."""


class Record(BaseModel):
    """A frozen piece of the contract: no NaN, no infinity; unknown fields are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


class LayerMLoss(Record):
    """M-Loss of one layer: a row of the table that is drawn by layer and by node."""

    layer: str
    activation: str
    nodes: Annotated[int, Field(ge=1)]
    absolute: Loss
    relative: Loss
    node: tuple[Loss, ...] = ()
    kind: Kind = "activation"
    heads: tuple[Loss, ...] = ()
    """Relative M-Loss of each head of an attention."""
    mean_gap: Loss | None = None
    """Norm over the nodes of the measured mean gaps: what `expected_gap` is compared with."""
    expected_gap: Loss | None = None
    """Norm over the nodes of the mean gaps that the Gaussian model expects."""
    bound: Loss | None = None
    """Norm over the nodes of the bounds of the mean absolute gap."""
    ratio: Loss | None = None
    """Measured over expected; 1 where the Gaussian model holds."""
    agreement: Annotated[float, Field(ge=-1.000001, le=1.000001)] | None = None
    """Cosine of measured and expected mean gaps over the nodes."""

    @validator(mode="after")
    def _one_value_a_node(self) -> LayerMLoss:
        if self.node and len(self.node) != self.nodes:
            raise ValueError(f"{self.layer} has {self.nodes} nodes but {len(self.node)} values")
        return self


class Cutoffs(Record):
    """Relative M-Loss from which a layer is called fair, and poor."""

    fair: Loss = 0.05
    poor: Loss = 0.2

    def level(self, relative: float) -> Level:
        """Return the level of a relative M-Loss."""
        return "poor" if relative >= self.poor else "fair" if relative >= self.fair else "good"


class Finding(Record):
    """One question that the check asked, and its answer."""

    question: str
    verdict: str
    level: Level
    where: str | None = None
    value: float | None = None
    unit: str = ""
    """A unit that begins with "fraction" or "relative" makes the number a percentage."""
    advice: str = ""
    decides: bool = True
    """False where the number stands for comparison and the verdict passes it by."""
    by_place: dict[str, float] = {}
    """The value by tensor, block or pair, where it has one in each."""


class Check(Record):
    """What `mergewell check --json` says."""

    version: Literal[1] = 1
    base: str
    experts: tuple[str, ...]
    samples: int | None = None
    mode: str | None = None
    layers: tuple[LayerMLoss, ...] = ()
    predictors: Mapping[str, float | Matrix | None] = {}
    prediction: dict[str, JsonValue] | None = None
    verdict: str
    level: Level | None = None
    uncovered: tuple[str, ...] = ()
    uncovered_reasons: dict[str, str] = {}
    unanswered: dict[str, str] = {}
    """Questions without an answer, by diagnostic: what they ask for, or why it is too little."""
    unmeasured: dict[str, str] = {}
    """Tensors that a decomposition left out, and why."""
    findings: tuple[Finding, ...] = ()
    cutoffs: Cutoffs = Cutoffs()


class Accuracy(Record):
    """Accuracy by model and task."""

    base: dict[str, Share] = {}
    expert: dict[str, Share] = {}
    ensemble: dict[str, Share] = {}
    merged: dict[str, dict[str, Share]] = {}


class Intervals(Record):
    """95 % bootstrap intervals, in the shape of `Accuracy`; the task "mean" is the mean."""

    base: dict[str, Interval] = {}
    expert: dict[str, Interval] = {}
    ensemble: dict[str, Interval] = {}
    merged: dict[str, dict[str, Interval]] = {}


class Models(Record):
    """Which models were merged."""

    base: str
    experts: tuple[str, ...]


class Worst(Record):
    """The task on which a merge keeps least of its expert."""

    task: str
    value: Loss


class Retention(Record):
    """Merged accuracy over expert accuracy, with its 95 % interval."""

    mean: Loss
    low: Loss | None = None
    high: Loss | None = None
    worst: Worst | None = None


class Merge(Record):
    """How one merge was made."""

    method: str
    recipe: str = ""
    path: str = ""
    command: str = ""


class Results(Record):
    """Everything a page is made from; sections without data stay empty."""

    version: Literal[1] = 1
    title: str = "Merge report"
    tasks: tuple[str, ...] = ()
    models: Models | None = None
    accuracy: Accuracy = Accuracy()
    intervals: Intervals = Intervals()
    ensemble_kind: Literal["logits", "probabilities", "features"] | None = None
    retention: dict[str, Retention] = {}
    agreement: dict[str, dict[str, Share]] = {}
    kl: dict[str, dict[str, float]] = {}
    m_loss: tuple[LayerMLoss, ...] = ()
    cosines: Matrix = ()
    norms: dict[str, Loss] = {}
    sign_conflict: float | None = None
    check: Check | None = None
    merges: tuple[Merge, ...] = ()
    seconds: dict[str, Loss] = {}
    examples: dict[str, int] = {}
    """Test examples of each task."""
    versions: dict[str, str] = {}
    report: Annotated[str, AfterValidator(_plain_file_name)] = "index.html"

    @classmethod
    def of_check(cls, check: Check, *, title: str = "Will they merge?") -> Results:
        """Return the results of a check alone: nothing was merged or evaluated."""
        models = Models(base=check.base, experts=check.experts)
        return cls(title=title, models=models, m_loss=check.layers, check=check)

    @property
    def layers(self) -> tuple[LayerMLoss, ...]:
        """The M-Loss rows, wherever they stand."""
        return self.m_loss or (self.check.layers if self.check else ())

    @property
    def units(self) -> tuple[LayerMLoss, ...]:
        """The M-Loss rows of single layers, attentions and norms."""
        return tuple(layer for layer in self.layers if layer.kind not in WHOLES)

    @property
    def wholes(self) -> tuple[LayerMLoss, ...]:
        """The M-Loss rows of whole blocks and of the output."""
        return tuple(layer for layer in self.layers if layer.kind in WHOLES)

    @property
    def cosine_matrix(self) -> Matrix:
        """The cosines, else the check's predictor "cosine"."""
        held = self.check.predictors.get("cosine") if self.check and not self.cosines else None
        return held if isinstance(held, tuple) and len(held) == len(self.experts) else self.cosines

    @property
    def relative_norms(self) -> dict[str, float]:
        """The norms, else the check's predictors "relative_norm:EXPERT"."""
        held = self.check.predictors.items() if self.check else ()
        start = "relative_norm:"
        return self.norms or {
            name.removeprefix(start): value
            for name, value in held
            if name.startswith(start) and isinstance(value, float)
        }

    @property
    def conflict(self) -> float | None:
        """The sign conflict, else the check's predictor "sign_conflict"."""
        held = self.check.predictors.get("sign_conflict") if self.check else None
        found = held if isinstance(held, float) else None
        return found if self.sign_conflict is None else self.sign_conflict

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, or the tasks where they are not named."""
        return self.models.experts if self.models else self.check.experts if self.check else ()

    @property
    def cutoffs(self) -> Cutoffs:
        """Where a layer's relative M-Loss turns fair and poor."""
        return self.check.cutoffs if self.check else Cutoffs()

    @validator(mode="after")
    def _tasks_agree(self) -> Results:
        if MEAN in self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks need names of their own, and {MEAN!r} is taken")
        tables: dict[str, Mapping[str, object]] = {}
        for kind, held in (("accuracy", self.accuracy), ("intervals", self.intervals)):
            plain = {"base": held.base, "expert": held.expert, "ensemble": held.ensemble}
            tables |= {f"{kind}.{name}": table for name, table in plain.items() if table}
            tables |= {f"{kind}.merged.{name}": table for name, table in held.merged.items()}
        tables |= {f"agreement.{name}": table for name, table in self.agreement.items()}
        tables |= {f"kl.{name}": table for name, table in self.kl.items()}
        for name, table in tables.items():
            required = name.startswith("accuracy.")
            lacking = sorted(set(self.tasks) - set(table)) if required else []
            unknown = sorted(set(table) - set(self.tasks) - (set() if required else {MEAN}))
            if lacking or unknown:
                fault = f"lacks {lacking[0]!r}" if lacking else f"names {unknown[0]!r}"
                raise ValueError(f"{name} {fault}, but the tasks are {', '.join(self.tasks)}")
        return self

    @validator(mode="after")
    def _matrix_is_square(self) -> Results:
        count = len(self.cosines)
        if any(len(row) != count for row in self.cosines):
            raise ValueError("cosines is not a square matrix")
        if self.experts and count not in (0, len(self.experts)):
            raise ValueError(f"cosines is {count} x {count} for {len(self.experts)} experts")
        return self


R = TypeVar("R", bound=Record)


def validated(kind: type[R], data: Mapping[str, Any], *, where: str) -> R:
    """Return `data` as a record of the contract.

    Raises:
        DataError: a field is missing or has a wrong value; says `where` and which.
    """
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        raise DataError(sentence(error, where)) from error


def read_results(folder: Path) -> Results:
    """Return the results kept in `folder`.

    Raises:
        DataError: no readable `results.json` there, or one that breaks the contract.
    """
    path = folder / RESULTS_FILE
    return _with_nodes(validated(Results, read_object(path), where=str(path)))


def read_check(path: Path) -> Check:
    """Return the check that `mergewell check --json` wrote to `path`.

    Raises:
        DataError: the file cannot be read or breaks the contract.
    """
    return validated(Check, read_object(path), where=str(path))


def write_results(folder: Path, results: Results) -> Path:
    """Write `results.json` into `folder` in one step, and return its path.

    The node values of a check stand in `m_loss` alone where both have the same rows.

    Raises:
        DataError: an added field holds NaN or infinity.
        OutputError: the folder cannot be written.
    """
    try:
        fields = [
            f"{json.dumps(name)}: {json.dumps(value, allow_nan=False, ensure_ascii=False)}"
            for name, value in _without_twins(results).model_dump(mode="python").items()
        ]
    except ValueError as error:
        raise DataError(
            f"{folder / RESULTS_FILE}: an added field holds NaN or infinity; write null instead."
        ) from error
    return write_text(folder / RESULTS_FILE, "{" + ",\n ".join(fields) + "}\n")


def _without_twins(results: Results) -> Results:
    """Return the results without the node values that stand in `m_loss` as well."""
    check = results.check
    if check is None or check.layers != results.m_loss:
        return results
    bare = tuple(layer.model_copy(update={"node": ()}) for layer in check.layers)
    return results.model_copy(update={"check": check.model_copy(update={"layers": bare})})


def _with_nodes(results: Results) -> Results:
    """Return the results with the check's node values taken from `m_loss`, as they were written."""
    check = results.check
    if check is None or len(check.layers) != len(results.m_loss):
        return results
    full = tuple(
        layer.model_copy(update={"node": twin.node})
        if not layer.node and (layer.layer, layer.kind) == (twin.layer, twin.kind)
        else layer
        for layer, twin in zip(check.layers, results.m_loss, strict=True)
    )
    return results.model_copy(update={"check": check.model_copy(update={"layers": full})})
