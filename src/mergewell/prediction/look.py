"""What a model makes of a few inputs: its outputs, and what its blocks say, in one pass.

Shapes: N inputs, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergewell.calibration.collect import node_dim
from mergewell.calibration.data import kept
from mergewell.models.barrier import first_output
from mergewell.models.cut import cut
from mergewell.models.dataflow import Batch, evaluating, tensors
from mergewell.statistics.activation import BlockOutputs


@dataclass(frozen=True, slots=True)
class Seen:
    """What one model made of one task's inputs."""

    outputs: tuple[Tensor, ...]
    """The module's first output, batch by batch, in float32."""

    blocks: Mapping[str, Tensor]
    """Features of each block, pooled over positions, [N, D], in forward order; the outputs, if the
    module has no blocks."""

    @property
    def last(self) -> Tensor:
        """The last block's features."""
        return list(self.blocks.values())[-1]

    @property
    def middle(self) -> Tensor:
        """The middle block's features."""
        return list(self.blocks.values())[len(self.blocks) // 2]


def look(module: nn.Module, batches: Sequence[Batch]) -> Seen:
    """Return what a module makes of some inputs: blocks are pooled as `calibrate` pools them."""
    names = [piece.modules[0] for piece in cut(module) if piece.is_block]
    found: dict[str, list[Tensor]] = {}
    outputs: list[Tensor] = []
    for batch in batches:
        with ExitStack() as hooks:
            for name in names:

                def hook(
                    block: nn.Module, _: Any, output: Any, name: str = name, batch: Any = batch
                ) -> None:
                    value = tensors(output)[0]
                    dim = node_dim(block, value)
                    keep = kept(batch, value) if dim == -1 else None
                    laid = BlockOutputs.of([value], node_dim=dim, keep=keep)
                    found.setdefault(name, []).append(laid.pooled[0])

                hooks.callback(module.get_submodule(name).register_forward_hook(hook).remove)
            hooks.enter_context(evaluating([module]))
            hooks.enter_context(torch.no_grad())
            outputs.append(first_output(module, batch).float())
    blocks = {name: torch.cat(parts) for name, parts in found.items()}
    return Seen(tuple(outputs), blocks or {"(output)": torch.cat([_rows(o) for o in outputs])})


def _rows(output: Tensor) -> Tensor:
    return output.flatten(2).mean(-1) if output.dim() > 3 else output.flatten(1)
