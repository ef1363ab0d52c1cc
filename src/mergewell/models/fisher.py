"""Squared gradients of the log-likelihood of a model's own answers, sample by sample.

Shapes: N samples, T tokens, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergewell.errors import DataError, ModelError
from mergewell.models.barrier import first_output
from mergewell.models.dataflow import Batch, evaluating, tensors
from mergewell.tensor_group import random_key

Likelihood = Literal["classes", "features"]
"""What a model's output says of an answer: logits of classes, [N, C] or [N, T, C], or the mean of a
Gaussian of variance 1 in every feature."""

DRAWS = 4
"""Answers drawn for each sample."""


def squared_gradients(
    module: nn.Module, batch: Batch, likelihood: Likelihood, *, first: int, seed: int = 0
) -> dict[str, Tensor]:
    """Return, by parameter, the sum over samples of their mean squared gradient.

    The gradients are those of log p(y | x) at answers y drawn from the model's own p, `DRAWS` for
    each sample, by the sample's number (from `first`) and the seed alone; tokens that the batch's
    `attention_mask` leaves out have no answer. Each sample is run by itself: a squared gradient of
    a batch's loss is something else. Parameters that the output does not depend on get 0.

    Source: arXiv:2111.09832, section 3.1. Raises:
        ModelError: the module has no parameter, or gives no tensor.
        DataError: gradients are not finite.
    """
    parameters = dict(module.named_parameters())
    if not parameters:
        raise ModelError(f"{type(module).__name__} has no parameter, so no Fisher information.")
    asked = {name: parameter.requires_grad for name, parameter in parameters.items()}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    try:
        module.requires_grad_(True)
        with evaluating([module]), torch.enable_grad():
            for number in range(len(next(iter(tensors(batch))))):
                sample = _sample(batch, number)
                generator = torch.Generator().manual_seed(
                    random_key(seed, "fisher", first + number)
                )
                output = first_output(module, sample)
                for draw in range(DRAWS):
                    likely = _log_likelihood(output, sample, likelihood, generator)
                    found = torch.autograd.grad(
                        likely,
                        list(parameters.values()),
                        retain_graph=draw + 1 < DRAWS,
                        materialize_grads=True,
                    )
                    for part, gradient in zip(total.values(), found, strict=True):
                        part.addcmul_(gradient, gradient, value=1 / DRAWS)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(asked[name])
    for name, part in total.items():
        if not bool(part.isfinite().all()):
            raise DataError(
                f"The gradients of {name} are not finite on the data; leave out what breaks them."
            )
    return {name: part.detach() for name, part in total.items()}


def _log_likelihood(
    output: Tensor, sample: Batch, likelihood: Likelihood, generator: torch.Generator
) -> Tensor:
    """Return the log-likelihood of one drawn answer, up to a constant."""
    if likelihood == "features":
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32)
        return (output * noise.to(output)).sum()  # the gradient of -(output - answer)^2 / 2
    logits = output.flatten(0, -2)  # [tokens, C]
    mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
    if mask is not None and mask.shape == output.shape[:-1]:
        logits = logits[mask.flatten().bool()]
    chances = logits.detach().float().softmax(-1).cpu()
    answers = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
    return -functional.cross_entropy(logits.float(), answers, reduction="sum")


def _sample(batch: Batch, number: int) -> Batch:
    if isinstance(batch, Tensor):
        return batch[number : number + 1]
    return {name: tensor[number : number + 1] for name, tensor in batch.items()}
