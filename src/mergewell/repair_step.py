"""The repair of a recipe: what is mended, on which inputs, and what makes the module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from mergewell.errors import ModelError
from mergewell.labelled import load_labelled
from mergewell.models.dataflow import Batch
from mergewell.models.loader import ModuleSource

RepairKind = Literal["batch_norm", "repair"]
"""Re-estimated BatchNorm statistics, or REPAIR."""


class RepairStep(BaseModel):
    """Activation statistics that are mended on a few inputs once the weights are merged."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    batch_norm: str | None = None
    """Inputs on which the running statistics of every BatchNorm are measured anew."""

    repair: str | None = None
    """Inputs for REPAIR, which also scales layers without BatchNorm to the experts' moments."""

    samples: Annotated[int, Field(ge=2)] = 1024
    """At most this many inputs are used."""

    model_factory: str | None = None
    """PKG:FUNC or timm:NAME, which makes the module; the model's own folder when absent."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.batch_norm is None) == (self.repair is None):
            raise ValueError("name the inputs under one of batch_norm and repair")
        return self

    @property
    def kind(self) -> RepairKind:
        """What is repaired."""
        return "repair" if self.batch_norm is None else "batch_norm"

    @property
    def data(self) -> str:
        """A file or folder of inputs."""
        return self.batch_norm or self.repair or ""

    def on(self, data: str) -> RepairStep:
        """Return the step on other inputs."""
        return self.model_copy(update={self.kind: data})


def step_parts(
    step: RepairStep, folder: str | None
) -> tuple[Callable[[], nn.Module], tuple[Batch, ...]]:
    """Return what makes the module, and the inputs in batches; `folder` is the model's own.

    Raises:
        ModelError: nothing says what the architecture is.
        DataError: the inputs cannot be read.
    """
    source = module_source(step, folder)
    inputs = load_labelled(step.data, model_folder=folder, limit=step.samples)
    return source.build, inputs.batches


def module_source(step: RepairStep, folder: str | None) -> ModuleSource:
    """Return where the module of a step comes from.

    Raises:
        ModelError: nothing says.
    """
    if step.model_factory is None and (folder is None or not Path(folder).is_dir()):
        raise ModelError(
            f"{folder or 'The model'} is no Hugging Face folder, so a repair needs a model factory "
            "PKG:FUNC (or timm:NAME), which makes the module that takes these weights."
        )
    return ModuleSource.parse(step.model_factory or str(folder))
