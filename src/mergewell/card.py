"""The model card of a merged folder: README.md as the Hub reads it, made from the manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mergewell.errors import OutputError
from mergewell.methods.base import METHODS
from mergewell.recipe import MethodChoice, Recipe, make_recipe
from mergewell.storage.durable import write_durably
from mergewell.storage.folder import is_there
from mergewell.storage.hub import is_on_hub
from mergewell.storage.manifest import MANIFEST, Manifest, read_manifest

CARD = "README.md"
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_PAPER = re.compile(r"(arXiv|doi):(\S+?)[,;.]?(?=\s|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Licence:
    """What a model's own card says of its licence."""

    name: str
    """As the Hub writes it, such as apache-2.0; empty where nothing is said."""

    link: str = ""


def write_card(folder: str | Path) -> Path:
    """Write README.md into a merged folder, from its manifest and its inputs' cards.

    It holds the recipe, the inputs with their licences and hashes, and what to cite.

    Raises:
        CheckpointError: the folder has no readable manifest.
        RecipeError: the folder was not made by a recipe.
        OutputError: it has a card already, or it cannot be written.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    if (place / CARD).exists():
        raise OutputError(f"{place / CARD} exists already and nothing is overwritten; remove it.")
    write_durably(place / CARD, model_card(manifest, title=place.resolve().name).encode())
    return place / CARD


def model_card(manifest: Manifest, *, title: str) -> str:
    """Return the text of a card."""
    recipe = make_recipe(manifest.recipe, where=MANIFEST)
    started = Path(manifest.directory)
    models = dict(_models(recipe, started, manifest))
    licences = {model: licence_of(folder) for model, folder in models.items()}
    return "\n".join(
        [
            *_front(list(models), licences),
            f"# {title}",
            "",
            f"A merge of {len(recipe.experts)} models"
            + (f" fine-tuned from {_shown(recipe.base)}" if recipe.base is not None else "")
            + f", made with mergewell {manifest.versions.get('mergewell', '')}. "
            f"{manifest.tensors_changed} of {manifest.tensors} tensors differ from "
            f"{'the base' if recipe.base is not None else 'the first model'}.",
            "",
            "## Models",
            "",
            "| model | licence |",
            "|---|---|",
            *(f"| {_shown(model)} | {_told(licences[model])} |" for model in models),
            "",
            *_warning(licences),
            "## Recipe",
            "",
            "```yaml",
            recipe.to_yaml().rstrip(),
            "```",
            "",
            "## Methods",
            "",
            *_methods(recipe),
            "",
            "## Files that were merged",
            "",
            "| file | bytes | hash |",
            "|---|---|---|",
            *(
                f"| {Path(f.path).parent.name}/{Path(f.path).name} | {f.bytes} | `{f.hash}` |"
                for f in manifest.inputs
            ),
            "",
            f"`mergewell verify` compares this folder with its {MANIFEST}.",
            "",
        ]
    )


def licence_of(folder: Path) -> Licence:
    """Return what a model folder's README.md or LICENSE says."""
    card = folder / CARD
    if card.is_file():
        front = _FRONT.match(card.read_text(encoding="utf-8", errors="replace"))
        data = _yaml(front[1]) if front is not None else {}
        name: object = data.get("license")
        if isinstance(name, list) and name:
            name = cast("list[object]", name)[0]
        if isinstance(name, str):
            named = data.get("license_name") if name == "other" else None
            link: object = data.get("license_link")
            shown = str(named) if isinstance(named, str) else name
            return Licence(shown, link if isinstance(link, str) else "")
    for file in sorted(folder.glob("LICENSE*")):
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        first = next((line.strip() for line in lines if line.strip()), "")
        return Licence(first[:80])
    return Licence("")


def _models(recipe: Recipe, started: Path, manifest: Manifest) -> Iterator[tuple[str, Path]]:
    """Yield the models that are read, of stages too, and their folders."""
    known = {name for stage in (recipe, *recipe.stages.values()) for name in stage.stages}
    for one in (recipe, *recipe.stages.values()):
        for model in one.models:
            whole = is_there(started / model)
            for part in (model,) if whole else model.split("+"):
                if part in known:
                    continue
                folder = started / part
                if is_on_hub(part):
                    cached = f"models--{part.partition('@')[0].replace('/', '--')}"
                    paths = [Path(file.path) for file in manifest.inputs]
                    folder = next((p for p in paths if cached in p.parts), folder)
                yield part, folder if folder.is_dir() else folder.parent


def _front(models: Sequence[str], licences: Mapping[str, Licence]) -> list[str]:
    names = {licence.name for licence in licences.values()}
    one = names.pop() if len(names) == 1 else "other"
    known = re.fullmatch(r"[a-z0-9.-]+", one) is not None
    return [
        "---",
        f"license: {one if known else 'other'}",
        "base_model:",
        *(f"- {_quoted(_shown(model))}" for model in models),
        "tags:",
        "- merge",
        "- mergewell",
        "---",
        "",
    ]


def _warning(licences: Mapping[str, Licence]) -> list[str]:
    unknown = [_shown(model) for model, licence in licences.items() if not licence.name]
    names = sorted({licence.name for licence in licences.values() if licence.name})
    lines: list[str] = []
    if unknown:
        lines.append(f"Nothing is said of the licence of {', '.join(unknown)}: ask before use.")
    if len(names) > 1:
        lines.append(f"Several licences hold together: {', '.join(names)}.")
    return [line for text in lines for line in (text, "")]


def _methods(recipe: Recipe) -> list[str]:
    every = (recipe, *recipe.stages.values())
    choices: list[MethodChoice] = [
        choice
        for one in every
        for choice in (one.method, *(r.method for r in one.rules if r.method is not None))
    ]
    names = dict.fromkeys(choice.name for choice in choices)
    return [
        f"- **{name}**: {METHODS.get(name).summary()} {_cited(name)}".rstrip() for name in names
    ]


def _cited(name: str) -> str:
    found = [
        f"https://arxiv.org/abs/{place}" if kind.lower() == "arxiv" else f"https://doi.org/{place}"
        for kind, place in _PAPER.findall(METHODS.get(name).paper)
    ]
    return f"Cite {', '.join(found)}." if found else ""


def _shown(model: str) -> str:
    """Return a name for a model: that of the Hub, or the last part of a path."""
    return Path(model).name if is_there(Path(model)) or Path(model).is_absolute() else model


def _told(licence: Licence) -> str:
    if not licence.name:
        return "not said"
    return f"[{licence.name}]({licence.link})" if licence.link else licence.name


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w./@-]+", text) else f"'{text.replace(chr(39), chr(39) * 2)}'"


def _yaml(text: str) -> dict[str, Any]:
    try:
        data: object = YAML(typ="safe").load(text)
    except YAMLError:
        return {}
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}
