"""Many numbers at once: Optuna proposes candidates, and a journal file keeps what each cost.

A killed search goes on where it was, and several processes or machines that name the same file
share one search.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergewell.errors import OutputError, RecipeError
from mergewell.tune.objective import Losses
from mergewell.tune.space import Candidate, axes
from mergewell.tune.strategy import Strategy

_RANDOM = 10
"""Candidates that are drawn at random before the tree-structured Parzen estimator sets in."""


class Journal(Strategy):
    """All parameters of all methods at once, by a tree-structured Parzen estimator.

    `scale` is any number between the ends of its `search`, by its logarithm; other parameters take
    the values of theirs. Source: Bergstra et al. 2011; Optuna's TPESampler, its constant liar on.
    """

    def __init__(
        self,
        methods: Sequence[str],
        path: str | Path,
        key: object,
        *,
        budget: int = 10,
        at_once: int = 1,
        seed: int = 0,
    ) -> None:
        """Open or begin a journal; `key` is what a search must share to be the same, as data.

        Raises:
            RecipeError: Optuna is not installed, no method, an unknown one, or one that needs a
                calibration.
            OutputError: the file is no journal, or another search's.
        """
        super().__init__()
        if not methods or budget < 1:
            raise RecipeError("A search needs a method and a budget of at least 1.")
        self._axes = {method: axes(method) for method in dict.fromkeys(methods)}
        self.methods = frozenset()  # a method without promise may never be tried
        self.total = budget * len(self._axes)
        self._at_once = at_once
        named = json.dumps([key, sorted(self._axes)], sort_keys=True, default=str)
        name = f"tune-{hashlib.sha256(named.encode()).hexdigest()[:16]}"
        self._study, self._complete = _opened(Path(path), name, seed)
        self._open: list[tuple[Candidate, Any]] = []

    def ask(self) -> Sequence[Candidate]:
        """Return new candidates, as many as are tried at once; what is known is not tried again."""
        given: list[Candidate] = []
        known = {_key(candidate): losses for candidate, losses in self.done()}
        while (left := self.total - len(self._finished()) - len(given)) > 0:
            if len(given) == min(self._at_once, left + len(given)):
                break
            trial = self._study.ask()
            candidate = self._of(trial)
            if _key(candidate) in known:
                self._told(trial, candidate, known[_key(candidate)])
                continue
            self._open.append((candidate, trial))
            given.append(candidate)
        return given

    def tell(self, candidate: Candidate, losses: Losses) -> None:
        """Write down what a candidate costs."""
        place = next(i for i, (one, _) in enumerate(self._open) if one == candidate)
        self._told(self._open.pop(place)[1], candidate, losses)

    def done(self) -> Sequence[tuple[Candidate, Losses]]:
        """Return all candidates of the journal that are judged, each once, whoever tried them."""
        found: dict[str, tuple[Candidate, Losses]] = {}
        for trial in self._finished():
            candidate = Candidate(**json.loads(trial.user_attrs["candidate"]))
            losses = tuple(np.array(task) for task in json.loads(trial.user_attrs["losses"]))
            found.setdefault(_key(candidate), (candidate, losses))
        return list(found.values())

    def _finished(self) -> Sequence[Any]:
        return self._study.get_trials(deepcopy=False, states=(self._complete,))

    def _told(self, trial: Any, candidate: Candidate, losses: Losses) -> None:
        fields = {
            "method": candidate.method,
            "parameters": dict(candidate.parameters),
            "scale": candidate.scale,
        }
        trial.set_user_attr("candidate", json.dumps(fields))
        trial.set_user_attr("losses", json.dumps([task.tolist() for task in losses]))
        self._study.tell(trial, float(np.mean([task.mean() for task in losses])))

    def _of(self, trial: Any) -> Candidate:
        method = trial.suggest_categorical("method", list(self._axes))
        picked: dict[str, Any] = {}
        scale: float | None = None
        for name, values in self._axes[method].items():
            if name == "scale":
                low, high = min(values), max(values)
                scale = trial.suggest_float(f"{method}.scale", low, high, log=low > 0)
            else:
                place = trial.suggest_categorical(f"{method}.{name}", list(range(len(values))))
                picked[name] = values[place]
        return Candidate(method, picked, None if scale is None else float(f"{scale:.4g}"))


def _key(candidate: Candidate) -> str:
    return f"{candidate.shared} {candidate.scale}"


def _opened(path: Path, name: str, seed: int) -> tuple[Any, Any]:
    """Return a study, and the state of its trials that are done."""
    try:
        optuna: Any = importlib.import_module("optuna")
        journal: Any = importlib.import_module("optuna.storages.journal")
    except ImportError as error:
        raise RecipeError(
            "--search optuna needs Optuna, which is not installed: pip install 'mergewell[tune]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
        names = [each.study_name for each in optuna.get_all_study_summaries(storage)]
        if not names:
            optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{path} is no journal of a search ({type(error).__name__}); name another file."
        ) from error
    if names and name not in names:
        raise OutputError(
            f"{path} is the journal of another search (other models, methods, data or reference); "
            "name another file."
        )
    study = optuna.load_study(study_name=name, storage=storage)
    begun = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=_RANDOM, multivariate=False, constant_liar=True, seed=seed + begun
    )
    return study, optuna.trial.TrialState.COMPLETE
