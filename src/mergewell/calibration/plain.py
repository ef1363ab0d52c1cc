"""Units as plain data: what a calibration's file says of the places where M-Loss was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor

from mergewell.models.activation import Activation, Slot, Step
from mergewell.models.units import Branch, Rows, Unit

_KINDS: Mapping[str, type[Any]] = {
    cls.__name__: cls for cls in (Unit, Branch, Rows, Activation, Step, Slot)
}
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_TAG = "is"


def plain(value: object) -> Any:
    """Return a unit, or a part of one, as data that JSON can hold.

    Raises:
        TypeError: it holds something that no file can, such as an open file.
    """
    if type(value).__name__ in _KINDS:
        held = {
            field.name: plain(getattr(value, field.name)) for field in fields(cast("Any", value))
        }
        return {_TAG: type(value).__name__, **held}
    if isinstance(value, Tensor):
        values: Any = value.tolist()  # pyright: ignore[reportUnknownVariableType]
        return {_TAG: "tensor", "dtype": str(value.dtype), "values": values}
    if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
        return {_TAG: "torch", "name": str(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value).items()
        return {_TAG: "mapping", "items": {key: plain(part) for key, part in items}}
    if isinstance(value, tuple | list):
        return [plain(part) for part in cast("list[object]", value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} {value!r} has no plain form.")


def unplain(data: Any) -> Any:
    """Return what `plain` was given; lists come back as tuples.

    Raises:
        KeyError, TypeError, ValueError: the data were not made by `plain`.
    """
    if isinstance(data, list):
        return tuple(unplain(part) for part in cast("list[Any]", data))
    if not isinstance(data, dict):
        return data
    held = dict(cast("dict[str, Any]", data))
    kind = held.pop(_TAG)
    if kind == "mapping":
        return {key: unplain(part) for key, part in held["items"].items()}
    if kind == "tensor":
        return torch.tensor(held["values"], dtype=_DTYPES[held["dtype"]])
    if kind == "torch":
        name = str(held["name"])
        return getattr(torch, name.removeprefix("torch.")) if "." in name else torch.device(name)
    if kind == "Step" and not str(held["operation"]).startswith("aten."):
        raise ValueError(f"{held['operation']!r} is no operation of torch's own.")
    return _KINDS[kind](**{key: unplain(part) for key, part in held.items()})
