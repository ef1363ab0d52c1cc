"""How deep the model is: the layer numbers in its tensors' names."""

from __future__ import annotations

import re

import torch

from mergewell.statistics.base import State, WeightStatistic
from mergewell.tensor_group import TensorGroup, Value

LAYER_PATTERN = r"(?:^|\.)(?:layers?|blocks?|resblocks|h)\.(\d+)(?:\.|$)"
"""Finds the layer number in the names that Llama, BERT, ViT, CLIP and GPT-2 give their tensors."""


def layer_number(pattern: str, name: str) -> int | None:
    """Return the number that the pattern's first group finds in a tensor's name, if any."""
    found = re.search(pattern, name)
    return int(found.group(1)) if found else None


class Depth(WeightStatistic):
    """The number of layers of the model: the largest layer number in the names, plus one.

    Reads the weights only because passes visit tensors by reading them.
    """

    pattern: str
    """Regular expression whose first group is the layer's number."""

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return the layer number of the tensor that begins in this block, [1]."""
        del done, index
        number = layer_number(self.pattern, group.name)
        if number is None or group.offset != 0:
            return {}
        return {f"{group.name}:layer": torch.tensor([number])}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `layers`, a number: 0 where no name has a layer number."""
        del name, numel
        return {"layers": torch.tensor(max((int(n) + 1 for n in done.values()), default=0))}
