"""Side: one of two things that are compared, read from whatever mergewell wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mergewell.errors import DataError
from mergewell.report.results import RESULTS_FILE, Check, Results, read_check, read_results
from mergewell.report.story import command_of, ranking
from mergewell.storage.manifest import MANIFEST, Manifest, read_manifest

T = TypeVar("T")
Setting = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Side:
    """A merge, a demo or a check; what is not known stays empty."""

    name: str
    results: Results | None = None
    method: str | None = None
    """Which merge of the results this is; None where nothing was merged."""
    manifest: Manifest | None = None
    recipe: Mapping[str, Setting] = field(default_factory=dict[str, Setting])
    """The recipe's settings, by their dotted path."""

    @property
    def check(self) -> Check | None:
        """The check behind it."""
        return self.results.check if self.results else None

    @property
    def accuracy(self) -> Mapping[str, float]:
        """The merge's accuracy by task."""
        return self._by_method(self.results.accuracy.merged if self.results else {})

    @property
    def intervals(self) -> Mapping[str, tuple[float, float]]:
        """The intervals of the accuracy, by task."""
        return self._by_method(self.results.intervals.merged if self.results else {})

    @property
    def agreement(self) -> Mapping[str, float]:
        """How often the merge agrees with the ensemble, by task."""
        return self._by_method(self.results.agreement if self.results else {})

    def _by_method(self, held: Mapping[str, Mapping[str, T]]) -> Mapping[str, T]:
        return held.get(self.method, {}) if self.method is not None else {}


def read_side(path: Path) -> Side:
    """Return what stands at `path`.

    A merged folder below a results folder brings its accuracies along; of a results folder with
    several merges, the best one is taken.

    Raises:
        DataError: there is nothing that mergewell wrote, or it is broken.
        CheckpointError: a manifest is broken.
    """
    if path.is_file():
        return Side(path.name, Results.of_check(read_check(path)))
    if (path / RESULTS_FILE).is_file():
        results = read_results(path)
        merits = ranking(results)
        method = merits[0].method if merits else None
        name = f"{path.resolve().name}/{method}" if method else path.resolve().name
        return Side(name, results, method, recipe=_recipe_of(results, method))
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        results, method = _results_around(path)
        name = path.resolve().name
        return Side(name, results, method, manifest, flat(manifest.recipe))
    raise DataError(
        f"{path} holds neither {RESULTS_FILE} nor {MANIFEST}; name a merged folder, a folder of "
        "`mergewell demo`, or a file of `mergewell check --json`."
    )


def flat(value: object, path: str = "") -> dict[str, Setting]:
    """Return nested settings by their dotted path; items of lists are counted from 1."""
    items: Sequence[tuple[object, object]]
    if isinstance(value, Mapping):
        items = list(cast("Mapping[object, object]", value).items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(cast("Sequence[object]", value), start=1))
    else:
        return {path: value if isinstance(value, str | int | float | bool) else None}
    found: dict[str, Setting] = {}
    for name, held in items:
        found |= flat(held, f"{path}.{name}" if path else str(name))
    return found


def _recipe_of(results: Results, method: str | None) -> dict[str, Setting]:
    merge = command_of(results, method) if method else None
    if merge is None or not merge.recipe:
        return {}
    try:
        loaded: Any = YAML(typ="safe", pure=True).load(StringIO(merge.recipe))  # pyright: ignore[reportUnknownMemberType]
    except YAMLError:
        return {"recipe": merge.recipe}
    return flat(loaded)


def _results_around(path: Path) -> tuple[Results | None, str | None]:
    """Return the results of a folder above that holds this merge, and the merge's name there."""
    whole = path.resolve()
    for folder in list(whole.parents)[:2]:
        if (folder / RESULTS_FILE).is_file():
            results = read_results(folder)
            for merge in results.merges:
                if merge.path and (folder / merge.path).resolve() == whole:
                    return results, merge.method
    return None, None
