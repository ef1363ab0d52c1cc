"""Component: a named, frozen, documented building block that is found by its file name.

A family (methods, diagnostics, ...) is a package; each of its files but `base` and `ops` holds one
component whose name is the file's name. Nothing else has to be edited to add one.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import reprlib
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergewell.errors import MergewellError, RecipeError, did_you_mean

Fraction = Annotated[float, Field(gt=0, le=1)]
"""A fraction in (0, 1], such as a density."""

Fractions = Fraction | tuple[Fraction, ...]
"""A fraction for all experts, or one for each."""

Probability = Annotated[float, Field(ge=0, le=1)]
"""A number in [0, 1]."""


def for_each(value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return `count` numbers: those given, or the one given for all.

    Raises:
        RecipeError: another number of them is given.
    """
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        raise RecipeError(f"{len(value)} values are given for {count} experts; give one for each.")
    return value


class Component(BaseModel):
    """A frozen object whose fields are its parameters and whose docstrings are its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def component_name(cls) -> str:
        """Return the component's name: that of the file it is written in."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring, the line that listings show."""
        return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]

    def parameters(self) -> dict[str, Any]:
        """Return the parameters as plain data, ready for YAML or JSON."""
        return self.model_dump(mode="json")


C = TypeVar("C", bound=Component)


class Family(Generic[C]):
    """The components of one package, found by their file names."""

    def __init__(self, package: str, kind: type[C], word: str) -> None:
        """Make a family of `kind` in `package`; `word` is what messages call a member."""
        self.package = package
        self.kind = kind
        self.word = word
        self._known: frozenset[str] = frozenset()

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted, without importing a single member."""
        path = importlib.import_module(self.package).__path__
        found = (module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
        return tuple(sorted(n for n in found if n not in ("base", "ops") and not n.startswith("_")))

    def get(self, name: str) -> type[C]:
        """Return the component called `name`.

        Raises:
            RecipeError: no file of that name exists; the message suggests the nearest.
        """
        if name not in self._known:  # looking through the folder for every tensor would take time
            self._known = frozenset(self.names())
        if name not in self._known:
            raise RecipeError(
                f"There is no {self.word} {name!r}: {did_you_mean(name, self.names())}"
            )
        return _only_component(f"{self.package}.{name}", self.kind)

    def build(self, name: str, parameters: Mapping[str, Any], *, where: str = "") -> C:
        """Return the component `name` with these parameters.

        Raises:
            RecipeError: an unknown name or parameter, or a value out of bounds; says `where`.
        """
        cls = self.get(name)
        try:
            return cls.model_validate(dict(parameters))
        except ValidationError as error:
            prefix = f"{where}: " if where else ""
            raise RecipeError(prefix + explain(error, cls, f"{self.word} {name}")) from error


def explain(error: ValidationError, cls: type[BaseModel], owner: str) -> str:
    """Return the first complaint of a validation error as one sentence.

    The refused value is abridged: ten lines of YAML aliases can stand for gigabytes.
    """
    first = error.errors(include_url=False)[0]
    # the alternatives of a union stand in the path too, under names that no field can have
    path = (str(part) for part in first["loc"])
    field = ".".join(part for part in path if part.isidentifier() or part.isdecimal()) or "value"
    if first["type"] == "extra_forbidden":
        advice = did_you_mean(field, cls.model_fields)
        return f"{owner} has no parameter {field!r}: {advice}"
    if first["type"] == "missing":
        return f"{owner} needs {field!r}; add it."
    return f"{owner}: {field} = {reprlib.repr(first['input'])} is refused: {first['msg']}."


@cache
def _only_component(module_name: str, kind: type[C]) -> type[C]:
    module = importlib.import_module(module_name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, kind) and value.__module__ == module_name
    ]
    if len(found) != 1:
        raise MergewellError(
            f"{module_name} must define exactly one {kind.__name__}, but defines {len(found)}."
        )
    return found[0]
