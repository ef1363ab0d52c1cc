"""A mergekit configuration turned into a recipe: one method, and rules where tensors differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergewell.errors import RecipeError
from mergewell.mergekit.config import Config, Slice, Source, evaluate, read_config
from mergewell.mergekit.methods import Arguments, Default
from mergewell.mergekit.rules import Treatment, make_rules
from mergewell.methods.base import METHODS
from mergewell.opening import NO_STAGES, open_model
from mergewell.recipe import LayerRange, Recipe, make_recipe
from mergewell.storage.base import Checkpoint
from mergewell.storage.layer_stack import LayerNames, find_layers, stands_before


@dataclass(frozen=True, slots=True)
class _Model:
    """A model as a recipe says it."""

    path: str
    layers: tuple[LayerRange, ...]

    def as_data(self, coefficient: float) -> dict[str, Any]:
        return {
            "path": self.path,
            "coefficient": coefficient,
            "layers": [piece.model_dump(exclude_none=True) for piece in self.layers],
        }


def recipe_from_mergekit(
    data: Mapping[str, Any],
    *,
    where: str,
    base_dir: Path,
    stages: Mapping[str, Recipe] = NO_STAGES,
) -> Recipe:
    """Return the recipe that a mergekit configuration describes; opens the headers of its models.

    Gradients and filters need the tensors' names, so they become rules of the recipe here.
    `where` begins the sentences of errors; paths are looked for beside `base_dir` first. `stages`
    are models that other configurations make, by the names that they have here.

    Source: mergekit 0.1.4, `reference/mergekit.md` section 2.
    Departures: unknown keys and parameters are refused, not ignored, and so are `modules` and
    slices with unequal numbers of sources. Without a word on tokenizers the models must have one
    vocabulary: tables are not cut to their common part. Inputs are merged as
    the files hold them, one dtype wider, and rounded once, not cast to `dtype` and rounded at every
    step. A path is looked for beside the configuration before the working folder. Weights that
    sum to 0 where they divide are refused (NaN there), and so is a result that equals the base.

    Raises:
        RecipeError: what is not understood or not supported, by its name.
        CheckpointError: a model that cannot be opened, or has no such layers.
    """
    config = read_config(data, where=where, base_dir=base_dir, stages=stages)
    return Conversion(config, where, stages).recipe()


class Conversion:
    """One configuration on its way to a recipe."""

    def __init__(
        self, config: Config, where: str, stages: Mapping[str, Recipe] = NO_STAGES
    ) -> None:
        self.config, self.where, self.peer, self.stages = config, where, config.peer, stages
        self.bases, experts = _roles(config, where)
        self.experts = experts
        """The sources that are merged, [slice][expert]."""
        self.base = self._stack(self.bases) if self.bases is not None else None
        self.models = [self._stack(column) for column in zip(*experts, strict=True)]
        if self.base is None and config.base_model not in (None, self.models[0].path):
            # only for its side files: configuration and tokenizer are the base_model's
            self.base = next(m for m in self.models if m.path == config.base_model)
        reference = self.base if self.base is not None else self.models[0]
        with open_model(reference.path, reference.layers, stages=stages) as checkpoint:
            self.names = [*checkpoint]
            self.layers = self._find_layers(checkpoint)
            self.casts = self._casts(checkpoint)

    def recipe(self) -> Recipe:
        """Return the recipe."""
        treatments = {name: self.treatment(name) for name in self.names}
        usual = Counter(treatments.values()).most_common(1)[0][0]
        rules = make_rules(treatments, usual, self.layers, self.config.filters())
        data: dict[str, Any] = {
            "experts": [
                model.as_data(coefficient)
                for model, coefficient in zip(self.models, usual.coefficients, strict=True)
            ],
            "method": usual.method_data(),
            "rules": [
                {
                    "match": pattern,
                    "method": treatment.method_data(),
                    **(
                        {"coefficients": treatment.coefficients}
                        if treatment.coefficients != usual.coefficients
                        else {}
                    ),
                }
                for pattern, treatment in rules
            ],
            "notes": self._notes(),
        }
        if self.base is not None:
            based = self.base.as_data(1.0)
            data |= {"base": based["path"], "base_layers": based["layers"]}
        if self.config.dtype is not None:
            data["dtype"] = self.config.dtype
        if self.config.tokenizer:
            data["tokenizer"] = self.config.tokenizer
        if self.stages:
            data["stages"] = self._used_stages()
        return make_recipe(data, where=self.where)

    def _used_stages(self) -> dict[str, Recipe]:
        """Return the stages that are models here, or of such stages."""
        models = [*self.models, *([self.base] if self.base is not None else [])]
        named = [model.path for model in models]
        named += [piece.path for model in models for piece in model.layers if piece.path]
        waiting = [part for path in named for part in (path, *path.split("+"))]
        used: dict[str, Recipe] = {}
        while waiting:
            name = waiting.pop()
            if name in self.stages and name not in used:
                used[name] = self.stages[name].model_copy(update={"stages": {}})
                waiting += [*self.stages[name].models, *self.stages[name].stages]
        return used

    def _stack(self, column: Sequence[Source]) -> _Model:
        """Return the model that one source of each slice make together."""
        ranges = [(source.model, *source.layers) for source in column if source.layers]
        if not ranges:
            return _Model(column[0].model, ())
        joined: list[tuple[str, int, int]] = []
        for path, start, stop in ranges:
            if joined and joined[-1][0] == path and joined[-1][2] == start:
                joined[-1] = (path, joined[-1][1], stop)
            else:
                joined.append((path, start, stop))
        first = joined[0][0]
        if len(joined) == 1 and joined[0][1] == 0:
            with open_model(first, (), stages=self.stages) as whole:
                if find_layers(whole, where=first).count == joined[0][2]:
                    return _Model(first, ())
        return _Model(
            first,
            tuple(
                LayerRange(path=path if path != first else None, start=start, stop=stop)
                for path, start, stop in joined
            ),
        )

    def _find_layers(self, checkpoint: Checkpoint) -> LayerNames | None:
        if self.config.has_gradient() or self.config.slices[0].sources[0].layers:
            return find_layers(checkpoint, where=f"{self.where}: {checkpoint.path}")
        return None

    def _casts(self, checkpoint: Checkpoint) -> bool:
        wanted = self.config.dtype
        dtypes = {spec.dtype for spec in checkpoint.specs.values() if spec.dtype.is_floating_point}
        return wanted is not None and {str(dtype) for dtype in dtypes} != {f"torch.{wanted}"}

    def treatment(self, name: str) -> Treatment:
        """Return what a tensor of the result gets."""
        piece, experts, t, renamed = self._place(name)
        each = {
            parameter: tuple(
                self._value(parameter, default, renamed[k], t, (source, piece, self.config))
                for k, source in enumerate(experts)
            )
            for parameter, default in self.peer.each.items()
        }
        shared = {
            parameter: self._value(parameter, default, name, t, (piece, self.config))
            for parameter, default in self.peer.shared.items()
        }
        coefficients = next(
            (each[key] for key in ("weight", "scale") if key in each), (1.0,) * len(experts)
        )
        method, parameters = self.peer.convert(Arguments(shared, each, self.bases is not None))
        if method == "keep" and self.casts:
            method, parameters = "average", {"normalize": False}
        self._check_method(method, parameters, name)
        return Treatment(method, tuple(parameters.items()), tuple(float(c) for c in coefficients))

    def _place(self, name: str) -> tuple[Slice, tuple[Source, ...], float, list[str]]:
        """Return a tensor's slice, sources, place in the slice, and its names in the sources.

        As in mergekit, t is 0 outside the layers and 1 in a slice of one layer.
        """
        slices, layers = self.config.slices, self.layers
        found = layers.split(name) if layers is not None else None
        if layers is None or found is None:
            index = 0 if stands_before(name) else -1
            experts = self.experts[index]
            return slices[index], experts, 0.0, [name] * len(experts)
        layer, rest = found
        for piece, experts in zip(slices, self.experts, strict=True):
            ranges = [source.layers or (0, layers.count) for source in experts]
            length = ranges[0][1] - ranges[0][0]
            if layer < length:
                t = layer / (length - 1) if length > 1 else 1.0
                return piece, experts, t, [layers.join(r[0] + layer, rest) for r in ranges]
            layer -= length
        raise AssertionError(name)

    def _value(
        self,
        parameter: str,
        default: Default,
        name: str,
        t: float,
        scopes: Sequence[Source | Slice | Config],
    ) -> float:
        for scope in scopes:
            if parameter in scope.parameters:
                value = evaluate(scope.parameters[parameter], name, t)
                if value is not None:
                    return value
        if default is None:
            of = next((f" of {scope.model}" for scope in scopes if isinstance(scope, Source)), "")
            raise RecipeError(
                f"{self.where}: {self.config.method} needs the parameter {parameter!r}{of} for "
                f"{name}; add it."
            )
        return default

    def _check_method(self, method: str, parameters: Mapping[str, Any], name: str) -> None:
        wanted = f"{self.where}: merge_method {self.config.method} is not supported yet: "
        if method not in METHODS.names():
            raise RecipeError(f"{wanted}it needs the method {method!r}.")
        fields = METHODS.get(method).model_fields
        for key, value in parameters.items():
            if key not in fields:
                raise RecipeError(f"{wanted}the method {method!r} has no {key} = {value!r}.")
        METHODS.build(method, parameters, where=f"{self.where}: {name}")

    def _notes(self) -> list[str]:
        given = {name for scope in _scopes(self.config) for name in scope}
        notes = [
            f"mergekit's {name} has no effect on {self.config.method}."
            for name in self.peer.idle
            if name in given
        ]
        if self.bases is not None:
            notes += [
                f"mergekit takes no {name} of the base {source.model}; it has no effect."
                for source in self.bases
                for name in source.parameters
            ]
        return notes


def _scopes(config: Config) -> Iterable[Mapping[str, object]]:
    yield config.parameters
    for piece in config.slices:
        yield piece.parameters
        for source in piece.sources:
            yield source.parameters


def _roles(
    config: Config, where: str
) -> tuple[tuple[Source, ...] | None, list[tuple[Source, ...]]]:
    """Return the base's sources, one a slice, and the experts' by slice."""
    base, role = config.base_model, config.peer.base
    if base is None and role in ("required", "pair"):
        raise RecipeError(f"{where}: {config.method} needs a base_model; name it.")
    bases: list[Source] = []
    experts: list[tuple[Source, ...]] = []
    for index, piece in enumerate(config.slices):
        whole = piece.sources[0].layers is None
        listed = [source for source in piece.sources if source.model == base]
        others = [source for source in piece.sources if source.model != base]
        if len(listed) > 1:
            raise RecipeError(f"{where}: base_model {base} is listed twice; name it once.")
        if base is not None and not listed:
            if role == "none" or not whole:
                at = "models" if whole else f"slices.{index}.sources"
                raise RecipeError(
                    f"{where}: base_model {base} is not among the {at}, where {config.method} "
                    "looks for it; add it there, or remove base_model."
                )
            listed = [Source(base, None, {})]  # as mergekit does: a model after the others
        if base is None or role == "none":
            experts.append(piece.sources)
        elif role in ("required", "optional"):
            bases += listed
            experts.append(tuple(others))
        elif role == "pair":
            experts.append((*listed, *others))
        else:
            added = any(source in piece.sources for source in listed)
            experts.append(piece.sources if added else (*piece.sources, *listed))
    counts = {len(sources) for sources in experts}
    if len(counts) > 1:
        raise RecipeError(
            f"{where}: slices: they have {sorted(counts)} sources, which is not supported yet; "
            "give every slice as many, with weight 0 where a model shall not count."
        )
    fewest, most = config.peer.experts
    if not fewest <= counts.pop() <= most:
        wanted = f"{fewest}" if fewest == most else f"at least {fewest}"
        raise RecipeError(
            f"{where}: {config.method} takes {wanted} models{' beside base_model' if bases else ''}"
            f", but {len(experts[0])} are named; mend the list."
        )
    return tuple(bases) if bases else None, experts
