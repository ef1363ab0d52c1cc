"""Places: where in a module a checkpoint's tensor goes, be it a whole tensor or a part of one.

A mixture of experts is stored expert by expert, as `experts.<e>.gate_proj.weight`, `up_proj` and
`down_proj` (Mixtral: `w1`, `w3`, `w2`); transformers computes with all experts of a layer at once,
as `experts.gate_up_proj` [E, 2 F, H], gate rows before up rows, and `experts.down_proj` [E, H, F].

Source: transformers 5, `conversion_mapping.py`, for the names and the order of the halves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

_PART = re.compile(r"(?P<before>.*\bexperts)\.(?P<expert>\d+)\.(?P<kind>\w+)\.weight")
_KINDS: Mapping[str, tuple[str, int | None]] = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
}
_CALLED = {"block_sparse_moe": "mlp", "embed_out": "lm_head"}
"""Parts of names in files, and what the same is called in modules of transformers 5."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of a module, or one expert's part of it."""

    name: str
    """The tensor's name in the module, or what it would be where there is none."""

    expert: int | None = None
    """Index in dimension 0; None is the whole tensor."""

    half: int | None = None
    """Upper or lower half of that expert's rows; None is all of them."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return this place's part of the module's tensor: the tensor itself, or a view."""
        if self.expert is None:
            return tensor
        part = tensor[self.expert]
        return part if self.half is None else part.chunk(2)[self.half]


def place_of(name: str, targets: Mapping[str, Tensor]) -> Place:
    """Return the place of a tensor of this name; one that is no target's if there is none."""
    if name in targets:
        return Place(name)
    called = ".".join(_CALLED.get(part, part) for part in name.split("."))
    if called in targets:
        return Place(called)
    found = _PART.fullmatch(called)
    if found is not None and found["kind"] in _KINDS:
        stack, half = _KINDS[found["kind"]]
        whole, expert = f"{found['before']}.{stack}", int(found["expert"])
        held = targets.get(whole)
        if held is not None and held.ndim == 3 and expert < len(held):
            return Place(whole, expert, half)
    return Place(name)


def filled(places: Iterable[Place], targets: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the targets that these places fill altogether."""
    parts: dict[str, set[Place]] = {}
    for place in places:
        if place.name in targets:
            parts.setdefault(place.name, set()).add(place)
    return {
        name
        for name, found in parts.items()
        if Place(name) in found or len(found) == len(targets[name]) * _halves(found)
    }


def _halves(places: set[Place]) -> int:
    return 2 if any(place.half is not None for place in places) else 1
