"""mergewell: will these models merge, how, what came out, and can the file be trusted.

The library in ten functions, which are imported when they are first used:

- `load_recipe`: a recipe from a file or plain data
- `plan_recipe`: what every tensor will get, and what it costs
- `examine_merge`: what makes merges garbage, before and after (`mergewell doctor`)
- `check_recipe`: will these experts merge?
- `calibrate_recipe`: what models do on a few inputs, for methods that are guided
- `learn_recipe`, `tune_recipe`: a better recipe, from data
- `merge_recipe`: the merge itself
- `evaluate_models`: how well models do their tasks
- `verify_folder`: is the result still what it was?
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergewell.api import (
        calibrate_recipe,
        check_recipe,
        evaluate_models,
        examine_merge,
        learn_recipe,
        load_recipe,
        merge_recipe,
        plan_recipe,
        tune_recipe,
        verify_folder,
    )

__all__ = [
    "calibrate_recipe",
    "check_recipe",
    "evaluate_models",
    "examine_merge",
    "learn_recipe",
    "load_recipe",
    "merge_recipe",
    "plan_recipe",
    "tune_recipe",
    "verify_folder",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is asked for: `import mergewell` alone imports no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'mergewell' has no attribute {name!r}")
    from mergewell import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
