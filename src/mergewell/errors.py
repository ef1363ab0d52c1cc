"""Every error that mergewell raises on purpose.

MergewellError
├── UserError            the user can mend it: one sentence with what, where and what to do (exit 2)
│   ├── RecipeError      a recipe, a flag or a parameter
│   ├── CheckpointError  a file of weights
│   ├── PlanError        a recipe that does not fit its checkpoints
│   ├── DataError        calibration or evaluation data
│   ├── ModelError       a checkpoint that cannot be made into a module, or a module not understood
│   └── OutputError      the place to write to
└── MethodError          a method broke its promise (ours, exit 1)
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MergewellError(Exception):
    """Anything that mergewell raises on purpose."""


class UserError(MergewellError):
    """Something that the user can mend; the message says what, where and what to do."""


class RecipeError(UserError):
    """A recipe, a flag or a parameter is wrong."""


class CheckpointError(UserError):
    """A file of weights is missing, damaged or of an unsupported kind."""


class PlanError(UserError):
    """A recipe does not fit the checkpoints that it names."""


class DataError(UserError):
    """Calibration or evaluation data cannot be used."""


class ModelError(UserError):
    """A checkpoint cannot be made into a module, or a module is not understood."""


class OutputError(UserError):
    """The output cannot be written where it was asked for."""


class MethodError(MergewellError):
    """A method broke its promise; names the method and the tensor."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the words to add to an unknown-name message: a near miss, or the whole list."""
    names = sorted(known)
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}."
