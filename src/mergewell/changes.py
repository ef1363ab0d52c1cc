"""Changes: how far a merge moved each tensor from the one it started from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Change:
    """How far some elements moved; those of one tensor are added up."""

    changed: bool
    """Whether any stored element, or the dtype, is not the original's."""

    moved: float = 0.0
    """Sum of the squared differences."""

    original: float = 0.0
    """Sum of the squared originals."""

    def __add__(self, other: Change) -> Change:
        return Change(
            self.changed or other.changed, self.moved + other.moved, self.original + other.original
        )

    @property
    def relative(self) -> float | None:
        """Norm of the difference over that of the original; None where there is none.

        Six significant digits: how the sums were cut into blocks shows only beyond them.
        """
        if self.original == 0.0:
            return None if self.changed else 0.0
        return float(f"{math.sqrt(self.moved / self.original):.6g}")


UNCHANGED = Change(changed=False)


def change_of(stored: Tensor, original: Tensor, wide: Tensor | None = None) -> Change:
    """Return how far `stored` [n] lies from `original` [n].

    `wide` is the original in the dtype to compute in, if it is at hand.
    """
    if wide is None:
        dtype = torch.promote_types(original.dtype, torch.float32)
        wide = original.to(dtype) if original.dtype.is_floating_point else original.double()
    difference = stored.to(wide.dtype).sub_(wide) if stored.dtype != wide.dtype else stored - wide
    moved = float(torch.dot(difference, difference))
    # A difference so small that its square is zero is a change all the same.
    changed = stored.dtype != original.dtype or moved > 0.0 or not torch.equal(stored, original)
    return Change(changed, moved, float(torch.dot(wide, wide)))


def notes_of(changes: Mapping[str, Change]) -> dict[str, Any]:
    """Return changes by tensor as plain data, for a shard's done record."""
    return {"changes": {n: [c.changed, c.moved, c.original] for n, c in changes.items()}}


def changes_in(notes: Iterable[Mapping[str, Any]]) -> dict[str, Change]:
    """Return the changes by tensor that done records hold."""
    found: dict[str, Change] = {}
    for note in notes:
        changes = cast("Mapping[str, tuple[bool, float, float]]", note.get("changes", {}))
        found |= {name: Change(*parts) for name, parts in changes.items()}
    return found


def summary(changes: Mapping[str, Change]) -> dict[str, Any]:
    """Return the manifest's fields on changes: how many tensors changed, and by how much."""
    return {
        "tensors_changed": sum(change.changed for change in changes.values()),
        "relative_change": sum(changes.values(), UNCHANGED).relative,
        "relative_changes": {n: c.relative for n, c in sorted(changes.items()) if c.changed},
    }
