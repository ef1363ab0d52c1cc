"""Plan: a recipe resolved against files. Reads headers only and raises every error they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergewell.errors import PlanError
from mergewell.guidance import Guidance, open_guidance
from mergewell.inputs import input_files
from mergewell.methods.base import MergeMethod
from mergewell.methods.keep import Keep
from mergewell.opening import adapter_behind, open_model
from mergewell.plan_checks import check_needs, find, listed, other_bases, warnings_about
from mergewell.recipe import Recipe, Rule
from mergewell.repair_step import module_source
from mergewell.stages import StageCheckpoint
from mergewell.storage.checkpoint import Checkpoint
from mergewell.storage.folder import DIFFUSION
from mergewell.storage.layout import shard_layouts
from mergewell.storage.manifest import Algorithm, InputFile, input_file
from mergewell.storage.spec import TensorSpec
from mergewell.storage.writer import ShardLayout
from mergewell.tensor_group import CHUNK
from mergewell.tokenizers.joint import with_one_vocabulary

BLOCK = 2 * CHUNK
"""Elements of a block: K + 1 of them in float32 and their temporaries stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class TensorTask:
    """What one tensor of the result gets."""

    spec: TensorSpec
    """The tensor as it will be written."""

    method: MergeMethod
    coefficients: tuple[float, ...]

    copied_from: int | None = None
    """Copy this model's bytes: 0 is the reference, 1 the first expert; None merges."""

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.spec.name

    @property
    def treatment(self) -> str:
        """What happens, in a word: the method's name or "copy"."""
        return "copy" if self.copied_from is not None else self.method.component_name()

    @property
    def calibration(self) -> tuple[str, ...]:
        """What guides the merge of this tensor, by family of the calibration."""
        return self.method.needs.calibration if self.copied_from is None else ()


@dataclass(frozen=True, slots=True)
class Mended:
    """What the repair of a recipe makes of its merge."""

    tensors: Mapping[str, Tensor]
    """The tensors that are not what was merged, as they are stored."""

    about: Mapping[str, Any]
    """What the manifest says of it."""


@dataclass(frozen=True)
class Plan:
    """A recipe with its opened checkpoints, one task a tensor, and the costs."""

    recipe: Recipe
    base: Checkpoint | None
    experts: tuple[Checkpoint, ...]
    tasks: Mapping[str, TensorTask]
    layouts: tuple[ShardLayout, ...]
    warnings: tuple[str, ...]
    guidance: Guidance | None = None
    """What the recipe's calibration says, where a method asks for it."""

    mended: Mended | None = None
    """What the recipe's repair gives, once the models were run: see `mergewell.repair.mended`."""

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint that says which tensors there are: the base, or the first expert."""
        return self.base if self.base is not None else self.experts[0]

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """The reference and then the experts: 0, 1, 2 ... of `Keep` and `copied_from`."""
        return (self.reference, *self.experts)

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        """All checkpoints that are read."""
        return ((self.base,) if self.base is not None else ()) + self.experts

    def data_records(self, algorithm: Algorithm) -> tuple[InputFile, ...]:
        """Return records of the files beside the models: the calibration, a repair's inputs."""
        records = [input_file(path, algorithm) for path in self._repair_inputs]
        if self.guidance is not None:
            known = self.guidance.digest if algorithm == "xxh3-128" else None
            records.append(input_file(self.guidance.file.path, algorithm, known=known))
        return tuple(records)

    @property
    def _repair_inputs(self) -> tuple[Path, ...]:
        return () if self.recipe.repair is None else input_files(self.recipe.repair.data)

    @property
    def metadata(self) -> dict[str, str]:
        """What stands in the header of each file of the result."""
        about = {"format": "pt", "mergewell.recipe": self.recipe.to_yaml()}
        if self.guidance is not None:
            about["mergewell.calibration"] = self.guidance.digest
        return about

    def resume_key(self) -> str:
        """Return what a partial run must share to be resumed: recipe and unchanged input files."""
        files = [file for model in self.inputs for file in model.files]
        stats = [file.stat() for file in (*files, *self._repair_inputs)]
        parts = [f"{s.st_size}.{s.st_mtime_ns}" for s in stats]
        if self.guidance is not None:
            parts.append(self.guidance.digest)
        return "-".join([self.recipe.digest(), *parts])

    @property
    def write_bytes(self) -> int:
        """Bytes of tensors to write."""
        return sum(task.spec.nbytes for task in self.tasks.values())

    @property
    def passes(self) -> int:
        """How often the weights are read: once, and once for each pass of the statistics."""
        return 1 + max(
            (s.passes for task in self.tasks.values() for s in task.method.statistics()), default=0
        )

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors to read, all passes."""
        total = 0
        for task in self.tasks.values():
            sizes = [model.spec(task.name).nbytes for model in self.inputs]
            if task.copied_from is not None:
                total += sizes[0]
            else:
                total += sum(sizes) * (1 + sum(s.passes for s in task.method.statistics()))
        return total

    def peak_bytes(self, workers: int, block: int = BLOCK) -> int:
        """Return an upper estimate of the memory that a run needs, beside torch itself."""
        models = len(self.experts) + 2
        largest = 0
        for task in self.tasks.values():
            granularity = task.method.needs.granularity
            whole = granularity == "matrix" and task.copied_from is None
            elements = task.spec.numel if whole else min(task.spec.numel, block)
            if granularity == "row" and task.spec.shape:
                row = task.spec.numel // max(1, task.spec.shape[0])
                elements = max(elements, min(row, task.spec.numel))
            largest = max(largest, elements)
        held = sum(task.spec.numel for task in self.tasks.values()) if self.recipe.repair else 0
        return largest * 8 * 3 * models * workers + 4 * 4 * held + (64 << 20)

    def as_data(self, workers: int) -> dict[str, Any]:
        """Return the plan as plain data: the contract of `mergewell plan --json`."""
        return {
            "version": 1,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "peak_bytes": self.peak_bytes(workers),
            "passes": self.passes,
            "tensors": [
                {
                    "name": task.name,
                    "method": task.treatment,
                    "shape": list(task.spec.shape),
                    "dtype": str(task.spec.dtype).removeprefix("torch."),
                    "coefficients": list(task.coefficients),
                    "parameters": {} if task.copied_from is not None else task.method.parameters(),
                    "calibration": list(task.calibration),
                }
                for task in self.tasks.values()
            ],
            "repair": self.recipe.repair.model_dump(mode="json") if self.recipe.repair else None,
            "warnings": list(self.warnings),
        }


def make_plan(recipe: Recipe) -> Plan:
    """Return the plan of a recipe; reads headers, `config.json` and no tensor.

    With a calibration, the ends of the models' tensors are read to know the models by.

    Raises:
        CheckpointError: a file that is missing or damaged.
        DataError: the calibration is none, or one of another version.
        PlanError: a recipe, or a calibration, that does not fit its checkpoints.
    """
    base = None
    if recipe.base is not None:
        base = open_model(recipe.base, recipe.base_layers, stages=recipe.stages)
    experts = tuple(
        open_model(expert.path, expert.layers, base=base, stages=recipe.stages)
        for expert in recipe.experts
    )
    opened = (*(() if base is None else (base,)), *experts)
    trained_on = other_bases(opened[0], experts)
    joint = with_one_vocabulary(recipe.tokenizer, opened)
    if base is not None:
        base = joint.models[0]
    experts = joint.models[len(opened) - len(experts) :]
    reference = joint.models[0]
    warnings = [*recipe.notes, *joint.warnings, *warnings_about(recipe, reference, experts)]
    warnings += trained_on
    warnings += [
        w for model in opened if isinstance(model, StageCheckpoint) for w in model.warnings
    ]
    guidance = None
    if recipe.calibration is not None:
        guidance = open_guidance(recipe.calibration, (reference, *experts))
    used_rules: list[Rule] = []
    tasks: dict[str, TensorTask] = {}
    for name in (name for shard in reference.shards for name in shard.names):
        rule = recipe.rule_for(name)
        if rule is not None:
            used_rules.append(rule)
            if rule.omit:
                continue
        tasks[name] = _task(recipe, rule, reference, base, experts, name, guidance)
    for expert in experts:
        extra = [name for name in expert if name not in reference]
        kept = [name for name in extra if not ((r := recipe.rule_for(name)) and r.omit)]
        used_rules += [rule for name in extra if (rule := recipe.rule_for(name))]
        if kept:
            raise PlanError(
                f"{expert.path}: {listed(kept)} not in {reference.path}; leave it out by a rule "
                f"{{match: {kept[0]!r}, omit: true}}."
            )
    for rule in recipe.rules:
        if rule not in used_rules:
            raise PlanError(f"Rule {rule.match!r} matches no tensor; mend its pattern or drop it.")
    if not tasks:
        raise PlanError("The rules leave out every tensor; nothing would be written.")
    if guidance is not None:
        guided = [task.name for task in tasks.values() if task.calibration]
        warnings.append(guidance.described(guided, list(tasks)))
    if recipe.repair is not None:  # what is missing shows now and not after the merge
        input_files(recipe.repair.data)
        module_source(recipe.repair, str(reference.path))
    written = {name: task.spec for name, task in tasks.items()}
    layouts = shard_layouts(reference.shards, written, recipe.shard_bytes)
    if reference.files[0].name.startswith(DIFFUSION):  # diffusers looks for its own name
        specs = tuple(spec for layout in layouts for spec in layout.specs)
        layouts = (ShardLayout(f"{DIFFUSION}.safetensors", specs),)
    return Plan(recipe, base, experts, tasks, layouts, tuple(warnings), guidance)


def _task(
    recipe: Recipe,
    rule: Rule | None,
    reference: Checkpoint,
    base: Checkpoint | None,
    experts: Sequence[Checkpoint],
    name: str,
    guidance: Guidance | None,
) -> TensorTask:
    spec = reference.spec(name)
    choice = rule.method if rule is not None and rule.method is not None else recipe.method
    method = choice.build()
    coefficients = recipe.coefficients_for(rule)
    if isinstance(method, Keep):
        return _kept(method, coefficients, (reference, *experts), name)
    check_needs(method, coefficients, base, experts)
    if method.needs.calibration and guidance is None:
        raise PlanError(
            f"{method.component_name()} is guided by a calibration; make one with `mergewell "
            "calibrate` and name it in the recipe with `calibration: FILE`."
        )
    guided = guidance is not None and guidance.guides(name, method.needs.calibration)
    method = method.for_tensor(name, shape=spec.shape, guided=guided)
    for expert in experts:
        other = find(expert, name, reference)
        if other.shape != spec.shape:
            raise PlanError(
                f"{expert.path}: {name} has shape {list(other.shape)}, but {list(spec.shape)} in "
                f"{reference.path}; choose one by a rule {{match: {name!r}, method: {{name: keep, "
                "model: 0}} or leave it out with omit: true."
            )
        if other.dtype.is_floating_point != spec.dtype.is_floating_point:
            raise PlanError(
                f"{expert.path}: {name} is {other.dtype}, but {spec.dtype} in {reference.path}; "
                "convert one of them first."
            )
    if not spec.dtype.is_floating_point:
        return TensorTask(spec, Keep(model=0), coefficients, copied_from=0)
    dtype = _stored(reference, name) if recipe.dtype is None else getattr(torch, recipe.dtype)
    return TensorTask(TensorSpec(name, dtype, spec.shape), method, coefficients)


def _kept(
    method: Keep, coefficients: tuple[float, ...], models: Sequence[Checkpoint], name: str
) -> TensorTask:
    if method.model >= len(models):
        raise PlanError(
            f"{name}: keep asks for model {method.model}, but there are {len(models) - 1} experts."
        )
    chosen = models[method.model]
    spec = find(chosen, name, models[0])
    adapter = adapter_behind(chosen)
    if adapter is not None and name in adapter.touched:
        written = TensorSpec(name, _stored(models[0], name), spec.shape)
        return TensorTask(written, method, coefficients)  # a sum that stands in no file
    return TensorTask(spec, method, coefficients, copied_from=method.model)


def _stored(reference: Checkpoint, name: str) -> torch.dtype:
    """Return the dtype that a merged tensor has in the reference's files, those of a model."""
    adapter = adapter_behind(reference)
    return adapter.stored_dtype(name) if adapter is not None else reference.spec(name).dtype
