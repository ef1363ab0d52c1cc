"""The command `evaluate`: arguments, and what it does and prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergewell.cli.explain import Base, Experts, Factory, Json, print_json

if TYPE_CHECKING:
    from torch import nn

    from mergewell.evaluate import Estimate
    from mergewell.evaluation.base import Measure
    from mergewell.evaluation.compared import Comparison

_BATCH = 32


def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(help="Models to judge, such as merged folders.")
    ] = None,
    base: Base = None,
    expert: Experts = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="A task's inputs with `labels`, or texts; repeat: in the order of the experts.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="pkg.module:function of a module, or lm-eval:TASK[@DIR]; repeat."
        ),
    ] = None,
    model_factory: Factory = None,
    samples: Annotated[int, typer.Option(min=1, help="At most this many inputs a task.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the intervals.")] = 0,
    json: Json = False,
) -> None:
    """Judge models on labelled data, texts or any metric; compare with the experts."""
    from mergewell.cli.progress import steps
    from mergewell.engines.base import one_thread_a_worker
    from mergewell.evaluation.compared import compare

    loader = _Models(models or [], base, expert or [], model_factory)
    measures = _measures(loader, data or [], metric or [], samples)
    with steps(patient=True) as shown, one_thread_a_worker():
        found = compare(
            loader, measures, experts=loader.experts, seed=seed, on_progress=shown.update
        )
    if json:
        print_json(found.as_data())
    else:
        _print(found)


class _Models(Mapping[str, "nn.Module"]):
    """The models by short name; each is made when it is asked for."""

    def __init__(
        self, given: Sequence[str], base: str | None, experts: Sequence[str], factory: str | None
    ) -> None:
        from mergewell.check import short_names
        from mergewell.errors import ModelError
        from mergewell.flags import recipe_from_flags
        from mergewell.opening import open_model

        recipe = _recipe_behind(given) if not experts and base is None else None
        if experts:
            recipe = recipe_from_flags(base=base, experts=experts, method="average", settings=[])
        own = [each.path for each in recipe.experts] if recipe is not None else []
        under = recipe.base if recipe is not None else base
        paths = [*([under] if under is not None else []), *own, *given]
        if not paths:
            raise ModelError("No model is named; name a merged folder, or --expert PATH.")
        paths = list(dict.fromkeys(paths))
        names = dict(zip(paths, short_names(paths), strict=True))
        self.experts = [names[path] for path in own]
        self.folder = next((Path(path) for path in paths if Path(path).is_dir()), None)
        self._factory = factory
        opened = open_model(under, ()) if under is not None else None
        self._opened = {names[path]: open_model(path, (), base=opened) for path in paths}
        self._under = under

    def __getitem__(self, name: str) -> nn.Module:
        from mergewell.check import build_module
        from mergewell.errors import ModelError
        from mergewell.models.loader import ModuleSource

        checkpoint = self._opened[name]
        homes = [checkpoint.path, *([Path(self._under)] if self._under is not None else [])]
        home = next((path for path in homes if (path / "config.json").is_file()), None)
        if self._factory is None and home is None:
            raise ModelError(
                f"{checkpoint.path} is no Hugging Face folder, so --model-factory PKG:FUNC (or "
                "timm:NAME) is needed, which makes the module that takes these weights."
            )
        return build_module(ModuleSource.parse(self._factory or str(home)).build, checkpoint)

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened)

    def __len__(self) -> int:
        return len(self._opened)


def _recipe_behind(given: Sequence[str]) -> Any:
    """Return the recipe of the first merged folder here whose inputs are still there."""
    from mergewell.recipe import recipe_of_manifest
    from mergewell.storage.folder import is_there, parts_of
    from mergewell.storage.manifest import MANIFEST, read_manifest

    for path in map(Path, given):
        if not (path / MANIFEST).is_file():
            continue
        manifest = read_manifest(path)
        recipe = recipe_of_manifest(manifest, where=str(path)) if manifest.recipe else None
        if recipe is None or recipe.stages:
            continue
        if all(is_there(Path(part)) for model in recipe.models for part in parts_of(model)):
            return recipe
    return None


def _measures(
    loader: _Models, data: Sequence[str], metrics: Sequence[str], samples: int
) -> list[Measure]:
    """Return the measures that data and metrics name, data first."""
    from mergewell.check import short_names
    from mergewell.errors import DataError
    from mergewell.evaluation.function import function_measure
    from mergewell.evaluation.harness import PREFIX, harness_measure
    from mergewell.evaluation.labelled import accuracy_on
    from mergewell.evaluation.perplexity import perplexity_on
    from mergewell.labelled import load_labelled

    if not data and not metrics:
        raise DataError(
            "Nothing says what to judge by; add --data PATH (with `labels`, or texts) or --metric."
        )
    if len(data) > 1 and loader.experts and len(data) != len(loader.experts):
        raise DataError(
            f"{len(data)} paths of data are named for {len(loader.experts)} experts; name one, or "
            "one for each expert, in their order."
        )
    found: list[Measure] = []
    for number, (path, name) in enumerate(zip(data, short_names(data), strict=True)):
        read = load_labelled(path, model_folder=loader.folder, limit=samples, batch_size=_BATCH)
        owner = number if len(data) > 1 and loader.experts else None
        if Path(path).suffix == ".jsonl":
            found.append(perplexity_on(name, read.batches, expert=owner))
        else:
            found.append(accuracy_on(name, read, expert=owner))
    for name in metrics:
        if not name.startswith(PREFIX):
            found.append(function_measure(name))
            continue
        if loader.folder is None:
            raise DataError(f"--metric {name} needs models in folders, with their tokenizer.")
        found.append(harness_measure(name, model_folder=loader.folder, limit=samples))
    return found


def _print(found: Comparison) -> None:
    width = max(map(len, found.models))
    for task, metric in found.metrics.items():
        examples = found.examples[task]
        how = f"{examples} examples" if examples > 1 else "one number"
        expert = f", retention against {found.experts[task]}" if task in found.experts else ""
        print(f"{task}: {metric} ({how}{expert})")
        for name, standing in found.models.items():
            kept = standing.retention.get(task)
            told = f"  {kept.value:.3f} retained" if kept is not None else ""
            print(f"  {name:<{width}}  {_number(standing.values[task])}{told}")
    if len(found.metrics) < 2 or not found.experts:
        return
    print("retention over all tasks")
    for name, standing in found.models.items():
        if standing.mean_retention is not None:
            print(
                f"  {name:<{width}}  {_number(standing.mean_retention)}  worst "
                f"{standing.worst_task}"
            )


def _number(one: Estimate) -> str:
    if one.low != one.low:
        return f"{one.value:.4g}"
    return f"{one.value:.4g} ({one.low:.4g} to {one.high:.4g})"
