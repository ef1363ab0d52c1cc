"""The Trainer's callback, called in the order in which the Trainer calls it."""

from __future__ import annotations

import torch
from torch import nn
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from mergewell.finetune import L2SP
from mergewell.finetune.trainer import PenaltyCallback


def test_the_penalty_joins_the_gradient_before_the_step() -> None:
    module = nn.Linear(1, 1, bias=False)
    callback = PenaltyCallback(lambda found: L2SP(found.parameters(), strength=2.0))
    handler = CallbackHandler([callback], module, None, None, None)
    args, state = TrainingArguments.__new__(TrainingArguments), TrainerState()
    handler.on_train_begin(args, state, TrainerControl())
    with torch.no_grad():
        module.weight += 3.0
    module.weight.grad = torch.ones(1, 1)
    handler.on_pre_optimizer_step(args, state, TrainerControl())
    assert module.weight.grad.tolist() == [[7.0]]
