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

_LONGEST = 2000
"""Characters that a message may have: a damaged file can hold names of any length."""


class MergewellError(Exception):
    """Anything that mergewell raises on purpose."""


class UserError(MergewellError):
    """Something that the user can mend; the message says what, where and what to do."""

    def __str__(self) -> str:
        """Return the message on one line; the middle of a very long one is left out."""
        text = " ".join(super().__str__().splitlines())
        half = _LONGEST // 2
        return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


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
