"""A penalty in the Hugging Face Trainer: one callback, whatever the penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from mergewell.finetune.base import Penalty


class PenaltyCallback(TrainerCallback):
    """Adds a penalty's gradient before every step of the optimiser.

    `PenaltyCallback(lambda module: L2SP(module.parameters(), strength=0.01))` as one of the
    Trainer's `callbacks`. Gradients are clipped before, so that the penalty is not. The loss that
    the Trainer logs is without it.
    """

    def __init__(self, make: Callable[[nn.Module], Penalty]) -> None:
        """Remember what makes the penalty of the module as it is when training begins."""
        self.make = make
        self.penalty: Penalty | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,  # the interface's, of which nothing is needed
    ) -> None:
        """Make the penalty; its start is the module now."""
        if model is not None:
            self.penalty = self.make(model)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add the penalty's gradient."""
        if self.penalty is not None:
            self.penalty.add_gradient()
