"""Any Python function as a measure: it takes the module and returns a number, or one an example."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mergewell.errors import RecipeError, UserError
from mergewell.evaluation.base import Measure, Rows


def function_measure(name: str, *, expert: int | None = None) -> Measure:
    """Return the measure that `package.module:function` names.

    The function gets the module, in eval mode, and returns a number, or a sequence or tensor of one
    an example, which gives the number its interval. More is better unless the function has an
    attribute `higher_is_better` that is False.

    Raises:
        RecipeError: there is no such module or function.
    """
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise RecipeError(f"--metric {name}: name a function as package.module:function.")
    try:
        found: object = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"--metric {name}: it cannot be imported ({error}); check the name and PYTHONPATH."
        ) from error
    if not callable(found):
        raise RecipeError(f"--metric {name} is no function; name one that takes a module.")
    return of_function(cast("Callable[[nn.Module], Any]", found), name=name, expert=expert)


def of_function(
    function: Callable[[nn.Module], Any], *, name: str, expert: int | None = None
) -> Measure:
    """Return a function of a module as a measure; see `function_measure`."""

    def rows(module: nn.Module) -> Rows:
        module.eval()
        try:
            with torch.no_grad():
                value = function(module)
        except UserError:
            raise
        except Exception as error:  # the function is the user's, whatever it raises
            raise RecipeError(
                f"--metric {name} raised {type(error).__name__} ({error}); mend the function."
            ) from error
        held = value.detach().cpu() if isinstance(value, torch.Tensor) else value
        try:
            return np.asarray(held, dtype=np.float64).reshape(-1)
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"--metric {name} returned {type(value).__name__}; return a number, or one an "
                "example."
            ) from error

    higher = bool(getattr(function, "higher_is_better", True))
    return Measure(name, name, rows, higher=higher, expert=expert)
