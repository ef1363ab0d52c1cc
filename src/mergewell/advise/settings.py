"""How experts were fine-tuned: what a user writes, and what trainers leave beside checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mergewell.component import explain
from mergewell.errors import DataError, did_you_mean
from mergewell.storage.strict_json import read_object

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]

CARD = re.compile(r"^\s*[-*]\s*(\w+)\s*:\s*`?([-+.\deE]+)`?\s*$", re.MULTILINE)
"""A line of the hyper-parameters in a model card, as the Hugging Face Trainer writes them."""

CARD_NAMES = {
    "learning_rate": "learning_rate", "total_train_batch_size": "batch_size",
    "train_batch_size": "batch_size", "training_steps": "steps", "num_epochs": "epochs",
}  # fmt: skip
"""Names there, the better source of one setting first."""


class ExpertSettings(BaseModel):
    """One fine-tuning, as a user writes it; whatever is not known is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: _Positive | None = None
    """The highest of its schedule."""
    batch_size: _Positive | None = None
    """Examples of one optimiser step, over all devices and accumulated ones."""
    steps: _Positive | None = None
    samples: _Positive | None = None
    """Different training examples."""
    epochs: _Positive | None = None
    optimiser: str | None = None
    start_loss: _Loss | None = None
    """Mean training loss before the first step, nats."""
    loss: _Loss | None = None
    """Mean training loss after the last step, nats."""
    checkpoints: dict[int, str] = Field(default_factory=lambda: dict[int, str]())
    """Earlier checkpoints of the same run by step; paths are relative to the settings file."""


class SettingsFile(BaseModel):
    """Settings of several experts: one for each, or by name, and what all have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: list[ExpertSettings] | dict[str, ExpertSettings] = Field(
        default_factory=lambda: list[ExpertSettings]()
    )
    all: ExpertSettings = ExpertSettings()


@dataclass(frozen=True, slots=True)
class Sourced:
    """A number, and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of how one expert was made."""

    numbers: Mapping[str, Sourced]
    """By the names of `ExpertSettings`; `samples` and `steps` also where epochs gave them."""

    optimiser: str | None = None
    checkpoints: Mapping[int, str] | None = None

    def value(self, name: str) -> float | None:
        """Return a number, or None where it is not known."""
        return self.numbers[name].value if name in self.numbers else None


def read_settings(path: Path) -> SettingsFile:
    """Return the settings in a YAML or JSON file.

    Raises:
        DataError: it cannot be read, is malformed, or names an unknown setting.
    """
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the settings ({error}); check the path.") from error
    except YAMLError as error:
        raise DataError(f"{path} is neither YAML nor JSON; mend or rewrite it.") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds no settings; write `experts:` with learning_rate, batch_size, steps and "
            "samples of each."
        )
    try:
        return SettingsFile.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "extra_forbidden":
            word = str(first["loc"][-1])
            model = SettingsFile if len(first["loc"]) == 1 else ExpertSettings
            advice = did_you_mean(word, model.model_fields)
            raise DataError(f"{path} has no setting {word!r}: {advice}") from error
        raise DataError(explain(error, SettingsFile, str(path))) from error


def known_of(
    names: Sequence[str], folders: Sequence[Path | None], file: Path | None
) -> tuple[Known, ...]:
    """Return what is known of each expert: the settings file first, then the files beside it.

    Without names there are as many experts as the file lists.

    Raises:
        DataError: the file is malformed, or lists other experts than are named.
        CheckpointError: a trainer's state beside an expert is malformed.
    """
    given = SettingsFile() if file is None else read_settings(file)
    written = _by_place(given, names, file)
    own = f"{file.name}" if file is not None else ""
    found: list[Known] = []
    for place, one in enumerate(written):
        numbers: dict[str, Sourced] = {}
        for model in (given.all, one):
            for name, value in model.model_dump(exclude_none=True).items():
                if isinstance(value, float):
                    numbers[name] = Sourced(value, own)
        folder = folders[place] if place < len(folders) else None
        beside = found_beside(folder) if folder is not None else {}
        early = dict(found_checkpoints(folder)) if folder is not None else {}
        if file is not None:
            paths = {**given.all.checkpoints, **one.checkpoints}
            early |= {step: str(file.parent / path) for step, path in paths.items()}
        found.append(
            Known(
                _derived({**beside, **numbers}),
                one.optimiser or given.all.optimiser,
                dict(sorted(early.items())),
            )
        )
    return tuple(found)


def found_beside(folder: Path) -> dict[str, Sourced]:
    """Return what trainer_state.json and the model card beside a checkpoint say.

    training_args.bin is a pickle and is not read; PEFT's adapter_config.json holds none of this.

    Raises:
        CheckpointError: a trainer's state that is malformed.
    """
    found: dict[str, Sourced] = {}
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        lines = {name: value for name, value in CARD.findall(text) if _number(value)}
        for theirs, ours in CARD_NAMES.items():
            if theirs in lines and ours not in found:
                found[ours] = Sourced(float(lines[theirs]), f"{folder.name}/README.md")
    state = folder / "trainer_state.json"
    if state.is_file():
        content = read_object(state, remedy="remove it or copy it again")
        for name, value in _of_state(content).items():
            found[name] = Sourced(value, f"{folder.name}/trainer_state.json")
    return found


def found_checkpoints(folder: Path) -> dict[int, str]:
    """Return the folders checkpoint-STEP beside an expert's weights, by step."""
    return {
        int(path.name.removeprefix("checkpoint-")): str(path)
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdecimal()
    }


def _of_state(state: Mapping[str, Any]) -> dict[str, float]:
    """Return what a Trainer's state says; its batch size is that of one device and is not used."""
    log = cast("list[dict[str, Any]]", state.get("log_history") or [])
    rates = [float(row["learning_rate"]) for row in log if "learning_rate" in row]
    losses = [float(row["loss"]) for row in log if "loss" in row]
    found = {"steps": state.get("global_step"), "epochs": state.get("epoch")}
    if rates:
        found["learning_rate"] = max(rates)
    if losses:
        found |= {"start_loss": losses[0], "loss": losses[-1]}
    return {n: float(v) for n, v in found.items() if isinstance(v, int | float) and v > 0}


def _derived(numbers: dict[str, Sourced]) -> dict[str, Sourced]:
    """Add the one of steps, samples and epochs that the others give."""
    held = {name: one.value for name, one in numbers.items()}
    if {"steps", "batch_size", "epochs"} <= set(held) and "samples" not in held:
        value = held["steps"] * held["batch_size"] / held["epochs"]
        numbers["samples"] = Sourced(value, "steps × batch size / epochs")
    if {"samples", "batch_size", "epochs"} <= set(held) and "steps" not in held:
        value = held["epochs"] * held["samples"] / held["batch_size"]
        numbers["steps"] = Sourced(value, "epochs × samples / batch size")
    return numbers


def _by_place(
    given: SettingsFile, names: Sequence[str], file: Path | None
) -> Sequence[ExpertSettings]:
    if isinstance(given.experts, dict):
        for name in given.experts if names else ():
            if name not in names:
                raise DataError(
                    f"{file}: no expert is called {name!r}: {did_you_mean(name, names)}"
                )
        return [given.experts.get(name, ExpertSettings()) for name in names or given.experts]
    if names and given.experts and len(given.experts) != len(names):
        raise DataError(
            f"{file} has settings of {len(given.experts)} experts, but {len(names)} are named; "
            "give one for each, in their order, or by name."
        )
    return given.experts or [ExpertSettings() for _ in names]


def _number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False
