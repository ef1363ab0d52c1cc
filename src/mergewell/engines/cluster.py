"""Cluster: the Ray cluster of RAY_ADDRESS, or one begun on this machine, and what its tasks say.

Ray before 2.61 does not ask for a password by itself: set RAY_AUTH_MODE=token.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mergewell.errors import OutputError, RecipeError, UserError

_RETRIES = 4
"""Times that the work of a lost machine is begun again."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that answers."""

    _ray: Any

    def task(self, job: Callable[..., object], *, workers: int = 1) -> Any:
        """Return a job as a task of so many threads, spread over the machines."""
        return self._ray.remote(
            num_cpus=workers, max_retries=_RETRIES, scheduling_strategy="SPREAD"
        )(job)

    def shared(self, value: object) -> Any:
        """Return a value as an argument that every machine gets once."""
        return self._ray.put(value)

    def first(self, waiting: Sequence[Any]) -> Any:
        """Wait until one of several tasks is done, and return it."""
        (ready, *_), _ = self._ray.wait(waiting, num_returns=1)
        return ready

    def result(self, ready: Any, failed: Callable[[str], str]) -> Any:
        """Wait for a task's result; `failed` makes a sentence of why there is none.

        Raises:
            OutputError: the task was lost on every machine.
            Exception: what the job raised.
        """
        try:
            return self._ray.get(ready)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        except self._ray.exceptions.RayError as error:
            raise OutputError(failed(str(error).splitlines()[0])) from error


@contextmanager
def cluster() -> Generator[Cluster]:
    """Yield the cluster; one that was begun here ends here.

    Raises:
        RecipeError: Ray is not installed.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise RecipeError(
            "--engine ray needs Ray, which is not installed: pip install 'mergewell[ray]'."
        ) from error
    began = not ray.is_initialized()
    if began:
        address = os.environ.get("RAY_ADDRESS")
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address is None else None,
        )
    try:
        yield Cluster(ray)
    finally:
        if began:
            ray.shutdown()
