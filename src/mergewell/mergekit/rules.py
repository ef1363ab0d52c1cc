"""What every tensor gets, written as the few rules of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from mergewell.storage.layer_stack import LayerNames


@dataclass(frozen=True, slots=True)
class Treatment:
    """What a tensor gets: the same object for tensors that get the same."""

    method: str
    parameters: tuple[tuple[str, Any], ...]
    coefficients: tuple[float, ...]

    def method_data(self) -> dict[str, Any]:
        """Return the method as a recipe says it."""
        data: dict[str, Any] = {"name": self.method}
        for key, value in self.parameters:
            data[key] = (
                list(cast("tuple[float, ...]", value)) if isinstance(value, tuple) else value
            )
        return data


def make_rules(
    treatments: Mapping[str, Treatment],
    usual: Treatment,
    layers: LayerNames | None,
    filters: Sequence[str],
) -> list[tuple[str, Treatment]]:
    """Return patterns and treatments, first match first, for all that is not as usual.

    The fewest that are read easily: by filter over the whole model, then by filter and layer,
    then whole layers, then single names.
    """
    rules: list[tuple[str, Treatment]] = []
    left = {name: treatment for name, treatment in treatments.items() if treatment != usual}

    def take(pattern: str, names: Iterable[str], treatment: Treatment) -> None:
        rules.append((pattern, treatment))
        for name in names:
            left.pop(name, None)

    for treatment, names in _groups(left).items():
        pattern = _covering([f"*{_escaped(text)}*" for text in filters], names, treatments)
        if pattern is not None:
            take(pattern, names, treatment)
    blocks: dict[str, list[str]] = {}
    if layers is not None:
        for name in treatments:
            if (found := layers.split(name)) is not None:
                blocks.setdefault(f"{_escaped(layers.prefix)}.{found[0]}.", []).append(name)
    for head, inside in blocks.items():
        groups = _groups({name: left[name] for name in inside if name in left})
        ordered = sorted(groups, key=lambda treatment: len(groups[treatment]))
        for treatment in ordered:
            names = groups[treatment]
            taken = [name for name in inside if not any(fnmatchcase(name, p) for p, _ in rules)]
            if set(taken) == set(names):
                take(f"{head}*", names, treatment)
                continue
            patterns = [f"{head}*{_escaped(text)}*" for text in filters]
            pattern = _covering(patterns, names, inside)
            if pattern is not None:
                take(pattern, names, treatment)
                continue
            for name in names:
                take(_escaped(name), [name], treatment)
    for name, treatment in [*left.items()]:
        take(_escaped(name), [name], treatment)
    return rules


def _groups(treatments: Mapping[str, Treatment]) -> dict[Treatment, list[str]]:
    groups: dict[Treatment, list[str]] = {}
    for name, treatment in treatments.items():
        groups.setdefault(treatment, []).append(name)
    return groups


def _covering(
    patterns: Iterable[str], names: Sequence[str], everything: Iterable[str]
) -> str | None:
    """Return the first pattern that matches exactly these names."""
    wanted = set(names)
    for pattern in patterns:
        if all((name in wanted) == fnmatchcase(name, pattern) for name in everything):
            return pattern
    return None


def _escaped(text: str) -> str:
    """Return a pattern that matches this text alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)
