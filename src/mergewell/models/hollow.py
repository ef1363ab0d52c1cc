"""Hollow: a module whose weights were not read yet, made fit for a trace at no memory."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from mergewell.models.dataflow import parts


@contextmanager
def filled(module: nn.Module) -> Generator[None, None, None]:
    """Stand constants of one number each in for tensors on the meta device, then put these back.

    A tensor that several modules share stays shared. Values mean nothing: only the dataflow may
    be looked at while this is open.
    """
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    stand_ins: dict[int, Tensor] = {}
    for _, part in parts(module):
        # written past nn.Module's checks: a parameter must come back as the very same object
        for table in (part._parameters, part._buffers):  # pyright: ignore[reportPrivateUsage]
            for name, tensor in cast("dict[str, Tensor | None]", table).items():
                if tensor is not None and tensor.device.type == "meta":
                    held.append((cast("dict[str, Any]", table), name, tensor))
    try:
        for table, name, tensor in held:
            if id(tensor) not in stand_ins:
                value = 0.01 if tensor.is_floating_point() else 0
                small = torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)
                is_parameter = isinstance(tensor, nn.Parameter)
                stand_ins[id(tensor)] = (
                    nn.Parameter(small, requires_grad=False) if is_parameter else small
                )
            table[name] = stand_ins[id(tensor)]
        yield
    finally:
        for table, name, tensor in held:
            table[name] = tensor
