"""Recipe: what is wanted, as data. YAML, flags and Python make the same object.

```yaml
base: path/to/base
experts:
- {path: path/to/mnist, coefficient: 1.0}
- {path: path/to/svhn}
method: {name: ties, density: 0.2}
rules:                                  # the first match wins; the rest take `method`
- {match: "*.bias", method: {name: average}}
- {match: "classifier.*", omit: true}
```
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError, YAMLWarning

from mergewell.component import explain
from mergewell.errors import RecipeError, did_you_mean
from mergewell.methods.base import METHODS, MergeMethod
from mergewell.repair_step import RepairStep
from mergewell.storage.folder import is_there
from mergewell.storage.manifest import MANIFEST, Manifest, manifest_at, repair_of
from mergewell.tokenizers.choice import TokenizerChoice

DtypeName = Literal["float64", "float32", "float16", "bfloat16"]

_DEEPEST = 100
"""Brackets in brackets that are read: the YAML reader's time grows with their square."""

_FROZEN = ConfigDict(
    frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
)


class MethodChoice(BaseModel):
    """A method by its name; every other key is one of its parameters."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str

    @model_validator(mode="after")
    def _exists(self) -> Self:
        self.build()
        return self

    def build(self) -> MergeMethod:
        """Return the method itself.

        Raises:
            RecipeError: an unknown method or parameter, or a value out of bounds.
        """
        return METHODS.build(self.name, self.model_extra or {})


class LayerRange(BaseModel):
    """Layers [start, stop) of a model, counted from 0."""

    model_config = _FROZEN

    path: str | None = None
    """A folder or file of weights; that of the expert (or base) when absent."""

    start: Annotated[int, Field(ge=0)]
    """The first layer."""

    stop: Annotated[int, Field(ge=1)]
    """The layer after the last."""

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if self.stop <= self.start:
            raise ValueError(f"stop must be above start, {self.start}")
        return self


class Expert(BaseModel):
    """One fine-tuned model."""

    model_config = _FROZEN

    path: str
    """A folder or file of weights."""

    coefficient: float = 1.0
    """Scales the expert in the merge."""

    layers: tuple[LayerRange, ...] = ()
    """Ranges of layers that are stacked into one model; the model as it stands when absent."""


class Rule(BaseModel):
    """What the tensors get whose names match a pattern."""

    model_config = _FROZEN

    match: Annotated[str, Field(min_length=1)]
    """A pattern for tensor names: * is any text, ? one character, [ab] one of these."""

    method: MethodChoice | None = None
    """The method for these tensors; the recipe's own when absent."""

    coefficients: tuple[float, ...] | None = None
    """The experts' coefficients for these tensors; the experts' own when absent."""

    omit: bool = False
    """Leave these tensors out of the result."""


class Recipe(BaseModel):
    """What to merge and how: the only currency between YAML, flags, Python, learning and search."""

    model_config = _FROZEN

    version: Literal[1] = 1

    base: str | None = None
    """The model that all experts were fine-tuned from."""

    base_layers: tuple[LayerRange, ...] = ()
    """Ranges of layers that are stacked into the base; the base as it stands when absent."""

    experts: Annotated[tuple[Expert, ...], Field(min_length=1)]
    """The experts, in order."""

    stages: dict[str, Recipe] = Field(default_factory=dict)
    """Recipes whose results are models of this one, by the names that stand in place of paths."""

    method: MethodChoice = MethodChoice(name="average")
    """The method for every tensor that no rule matches."""

    rules: tuple[Rule, ...] = ()
    """Exceptions by tensor name; the first match wins."""

    calibration: str | None = None
    """A file that `mergewell calibrate` made of these models, for methods that are guided by it."""

    repair: RepairStep | None = None
    """What `merge` mends once the weights are merged; `check` and `calibrate` look before it."""

    tokenizer: TokenizerChoice | None = None
    """Which vocabulary the result has; when absent, all models must have one and the same."""

    seed: int = 0
    """Seed of random methods."""

    dtype: DtypeName | None = None
    """Stored dtype of merged tensors; that of the base (or first expert) when absent."""

    shard_bytes: Annotated[int, Field(ge=1)] | None = None
    """Split the result into files of at most so many bytes; as the base's when absent."""

    notes: tuple[str, ...] = ()
    """What the recipe's maker wants said; the plan repeats it among its warnings."""

    @property
    def restacks(self) -> bool:
        """True when the model that says which tensors there are is a stack of layer ranges."""
        return bool(self.experts[0].layers if self.base is None else self.base_layers)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that is named, once: paths, `MODEL+ADAPTER`, names of stages."""
        experts = [(expert.path, expert.layers) for expert in self.experts]
        found = [*([(self.base, self.base_layers)] if self.base is not None else []), *experts]
        pieces = [piece.path for _, layers in found for piece in layers if piece.path is not None]
        return tuple(dict.fromkeys([*(path for path, _ in found), *pieces]))

    def rule_for(self, name: str) -> Rule | None:
        """Return the first rule that matches a tensor's name."""
        return next((rule for rule in self.rules if fnmatchcase(name, rule.match)), None)

    def coefficients_for(self, rule: Rule | None) -> tuple[float, ...]:
        """Return the experts' coefficients under a rule."""
        if rule is not None and rule.coefficients is not None:
            return rule.coefficients
        return tuple(expert.coefficient for expert in self.experts)

    def as_data(self) -> dict[str, Any]:
        """Return plain data, without what was left at its default."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return {"version": 1, **data, "method": self.method.model_dump(mode="json")}

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        stream = StringIO()
        yaml = YAML()
        yaml.default_flow_style = False
        yaml.dump(self.as_data(), stream)
        return stream.getvalue()

    def digest(self) -> str:
        """Return a short hash that is the same for equal recipes, defaults written out or not."""
        data = self.model_dump(mode="json", exclude={"notes"})
        for later in ("repair", "tokenizer", "stages"):  # recipes from before there was such
            if not data[later]:
                del data[later]
        for part, choice in [
            (data, self.method),
            *((data["rules"][i], rule.method) for i, rule in enumerate(self.rules)),
        ]:
            if choice is not None:
                part["method"] = {"name": choice.name, **choice.build().parameters()}
        if self.stages:
            data["stages"] = {name: stage.digest() for name, stage in self.stages.items()}
        text = json.dumps(data, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def make_recipe(data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Return the recipe that plain data describe.

    Raises:
        RecipeError: an unknown key, a wrong value, no expert; says `where`.
    """
    try:
        recipe = Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise RecipeError(_sentence(error, where)) from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    used = {model for one in (recipe, *recipe.stages.values()) for model in one.models}
    used |= {part for model in used for part in model.split("+")}
    for name in recipe.stages:
        if name not in used:
            raise RecipeError(
                f"{where}: stage {name!r} is no model of the recipe; name or drop it."
            )
    for rule in recipe.rules:
        if rule.coefficients is not None and len(rule.coefficients) != len(recipe.experts):
            raise RecipeError(
                f"{where}: rule {rule.match!r} has {len(rule.coefficients)} coefficients for "
                f"{len(recipe.experts)} experts; give one for each."
            )
    return recipe


def _sentence(error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    unknown = [str(e["loc"][0]) for e in error.errors() if e["type"] == "extra_forbidden"]
    if place == "experts" and unknown:
        advice = did_you_mean(unknown[0], Recipe.model_fields)
        return f"{where} has no parameter {unknown[0]!r}: {advice}"
    if place == "experts" and first["type"] in ("missing", "too_short"):
        return f"{where}: no expert is named; name at least one under `experts` or with --expert."
    return explain(error, Recipe, where)


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a YAML file, ours or mergekit's; paths are relative to the file.

    The file may also be the manifest of a merged folder: its recipe makes the same merge again.
    A model that is itself such a YAML file becomes a stage; so do the documents of a mergekit file
    that has several.

    Raises:
        RecipeError: no such file, not YAML, or not a recipe.
        CheckpointError: a model that a mergekit configuration names cannot be opened, or a manifest
            that is malformed.
    """
    return _read_recipe(Path(path), ())


def _read_recipe(file: Path, reading: tuple[Path, ...]) -> Recipe:
    if file.resolve() in reading:
        raise RecipeError(f"{file} is a stage of itself; mend one of the recipes.")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot read the recipe ({error}); check the path.") from error
    manifest = manifest_at(file)
    if manifest is not None:
        return recipe_of_manifest(manifest, where=str(file))
    contents = yaml_documents(text, file)
    # imported here because a conversion makes a recipe and looks into checkpoints
    from mergewell.mergekit import is_mergekit, recipe_from_documents
    from mergewell.mixture.choice import is_mixture

    if all(is_mergekit(content) for content in contents):
        return recipe_from_documents(contents, where=str(file), base_dir=file.parent)
    if len(contents) > 1:
        raise RecipeError(f"{file} has {len(contents)} documents; write stages under `stages`.")
    if is_mixture(contents[0]):
        raise RecipeError(
            f"{file} describes a mixture of experts, which is assembled and not merged; only "
            "`mergewell plan` and `mergewell merge` take it."
        )
    recipe = make_recipe(contents[0], where=str(file))
    stages = {
        model: _read_recipe(file.parent / model, (*reading, file.resolve()))
        for model in recipe.models
        if model.endswith((".yaml", ".yml")) and (file.parent / model).is_file()
    }
    return beside(recipe.model_copy(update={"stages": recipe.stages | stages}), file.parent)


def yaml_documents(text: str, file: Path) -> list[dict[str, Any]]:
    """Return the mapping in each document of a file of YAML; JSON is YAML too.

    Raises:
        RecipeError: it is not YAML, or a document is no mapping; says `file`.
    """
    if _depth(text) > _DEEPEST:
        raise RecipeError(f"{file}: the brackets are nested too deeply; a recipe needs a few.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of one anchor for two things
            documents: list[object] = list(YAML(typ="safe").load_all(text))
    except (YAMLError, YAMLWarning, ValueError, RecursionError) as error:
        where = str(error).replace("\n", " ")[:200]
        raise RecipeError(f"{file}: this is not YAML ({where}); mend it there.") from error
    found = [document for document in documents if document is not None]  # such as after a `---`
    if not found or not all(isinstance(document, dict) for document in found):
        raise RecipeError(f"{file}: a recipe is a mapping with `experts` and `method`.")
    return cast("list[dict[str, Any]]", found)


def _depth(text: str) -> int:
    """Return how deep brackets are nested; those in quotes count too, since few are there."""
    depth = deepest = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    return deepest


def recipe_of_manifest(manifest: Manifest, *, where: str) -> Recipe:
    """Return the recipe of a merged folder, with paths as seen from here; says `where`.

    Read where the merge was run, it is the very same, and so are the bytes that it makes.

    Raises:
        RecipeError: the folder was not made by a recipe alone, or the recipe is damaged.
    """
    repaired = repair_of(manifest)
    if not manifest.recipe and repaired:
        of = repaired.get("of")
        raise RecipeError(
            f"{where} is of a folder that `mergewell repair` made of {of}; merge by the "
            f"{MANIFEST} of that one and repair the result."
        )
    if not manifest.recipe:
        raise RecipeError(f"{where} is of a folder that was not merged; name a merge's manifest.")
    recipe = make_recipe(manifest.recipe, where=where)
    started = Path(manifest.directory)
    return recipe if started == Path.cwd() else beside(recipe, started)


def beside(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with paths that were meant relative to `folder` as seen from here."""

    def seen(path: str) -> str:
        there = folder / path
        if path in recipe.stages or Path(path).is_absolute():
            return path
        if is_there(there):
            return str(there)
        if "+" not in path:
            return path
        return "+".join(map(seen, path.split("+")))

    def seen_layers(ranges: tuple[LayerRange, ...]) -> tuple[LayerRange, ...]:
        return tuple(
            piece if piece.path is None else piece.model_copy(update={"path": seen(piece.path)})
            for piece in ranges
        )

    return recipe.model_copy(
        update={
            "base": seen(recipe.base) if recipe.base is not None else None,
            "base_layers": seen_layers(recipe.base_layers),
            "calibration": seen(recipe.calibration) if recipe.calibration is not None else None,
            "repair": recipe.repair.on(seen(recipe.repair.data)) if recipe.repair else None,
            "tokenizer": recipe.tokenizer.moved(seen) if recipe.tokenizer else None,
            "stages": {name: beside(stage, folder) for name, stage in recipe.stages.items()},
            "experts": tuple(
                expert.model_copy(
                    update={"path": seen(expert.path), "layers": seen_layers(expert.layers)}
                )
                for expert in recipe.experts
            ),
        }
    )
