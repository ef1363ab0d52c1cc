"""The Hugging Face Hub: `ORG/NAME@REVISION` is fetched into its cache, and a path is itself.

The revision must be named, so that a recipe means one model: best a commit. HF_ENDPOINT, HF_HOME,
HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

from mergewell.errors import CheckpointError
from mergewell.storage.folder import is_there

_NAMED = re.compile(r"[\w.-]+/[\w.-]+@[\w./-]+")
_BESIDE = ("*.json", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*")
_WEIGHTS = (("*.safetensors",), ("*.bin",))
"""Kinds of weights, the second only where a repository has none of the first."""


def is_on_hub(path: str) -> bool:
    """Return whether a path names a model of the Hub: no file here, and of the right form."""
    return _NAMED.fullmatch(path) is not None and not is_there(Path(path))


def local_path(path: str) -> Path:
    """Return the path itself, or the folder of the cache with what the Hub has under this name.

    Raises:
        CheckpointError: huggingface_hub is not installed, or there is no such model or revision,
            or it cannot be fetched.
    """
    if not is_on_hub(path):
        return Path(path)
    name, _, revision = path.partition("@")
    for weights in _WEIGHTS:
        folder = _snapshot(name, revision, [*weights, *_BESIDE])
        if any(found for kind in weights for found in folder.glob(kind)):
            return folder
    raise CheckpointError(
        f"{path}: the repository has neither .safetensors nor .bin at its top; give another."
    )


def _snapshot(name: str, revision: str, patterns: list[str]) -> Path:
    hub: Any = _library(f"{name}@{revision}")
    errors: Any = importlib.import_module("huggingface_hub.errors")
    try:
        return Path(
            hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                endpoint=os.environ.get("HF_ENDPOINT"),
                library_name="mergewell",
                tqdm_class=_silent(),
            )
        )
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r}; name a commit.") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated; accept its terms on its page and set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is not on the Hub, or not for you; check the name, or set HF_TOKEN."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise CheckpointError(
            f"{name}@{revision} cannot be fetched ({first}); check the connection, or give a local "
            "folder."
        ) from error


def _silent() -> Any:
    """Return a progress bar that shows nothing: what is printed is for the command line."""
    tqdm: Any = importlib.import_module("tqdm").tqdm

    class Silent(tqdm):  # pyright: ignore[reportUntypedBaseClass]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

    return Silent


def _library(path: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise CheckpointError(
            f"{path} is fetched by huggingface_hub, which is not installed: "
            "pip install 'mergewell[hub]'."
        ) from error
