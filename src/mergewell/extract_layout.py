"""What an extracted adapter does with each tensor, from names, shapes and what changed.

PEFT knows modules, a checkpoint only tensors: matrices and kernels of convolutions get factors,
embeddings are known by their names, and GPT-2's turned matrices by its `model_type`. Modules of
which anything else changed are kept whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast

import torch

from mergewell.errors import CheckpointError, PlanError, RecipeError
from mergewell.storage.adapter_keys import PREFIX, is_tied
from mergewell.storage.checkpoint import Checkpoint
from mergewell.storage.spec import is_mergeable

Kind = Literal["matrix", "turned", "embedding", "whole", "left out"]

_EMBEDDING = re.compile(
    r"(^|\.)(embed|embed_(?!out)\w*|\w*embeddings?|wte|wpe|shared|relative_attention_bias)\.weight$"
)
_TURNED_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_TURNED = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip
"""PEFT's words; those for classifiers are left out, since PEFT would keep any head whole."""

_BLOCK = 1 << 22
"""Elements that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What a tensor that changed gets."""

    kind: Kind
    module: str

    @property
    def is_cut(self) -> bool:
        """True where factors are made."""
        return self.kind in ("matrix", "turned", "embedding")

    @property
    def is_turned(self) -> bool:
        """True where the factors' product is the tensor's transpose."""
        return self.kind in ("turned", "embedding")


@dataclass(frozen=True, slots=True)
class Layout:
    """An adapter's modules and keys."""

    treatments: Mapping[str, Treatment]
    """By the names of the tensors that changed."""

    targets: tuple[str, ...]
    """How PEFT finds the modules with factors: ends of their names."""

    modules: tuple[str, ...]
    """Modules kept whole."""

    kept: Mapping[str, str]
    """Tensors kept whole, and their keys in the adapter."""

    biases: bool
    """Whether biases of modules with factors are among these."""

    task: str | None
    """PEFT's word for what the model is for."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Tensors that changed and are left at the base's."""
        return tuple(n for n, how in self.treatments.items() if how.kind == "left out")


def make_layout(
    base: Checkpoint, expert: Checkpoint, *, whole: Sequence[str], leave_out: Sequence[str]
) -> Layout:
    """Return what each tensor gets that differs between base and expert.

    Raises:
        CheckpointError: checkpoints that do not fit each other.
        PlanError: nothing changed, or a change that no adapter can hold.
        RecipeError: a pattern that matches no tensor that changed.
    """
    changed = _changed(base, expert)
    if not changed:
        raise PlanError(f"{expert.path} equals {base.path}; there is nothing to extract.")
    for pattern in (*whole, *leave_out):
        if not any(fnmatchcase(name, pattern) for name in changed):
            raise RecipeError(f"{pattern!r} matches no tensor that changed; mend or drop it.")
    treatments = {
        name: _treatment(base, expert, name, whole=whole, leave_out=leave_out) for name in changed
    }
    cut = [how.module for how in treatments.values() if how.is_cut]
    kept, modules = _kept(expert, treatments, frozenset(cut))
    if not cut and not kept:
        raise PlanError("Every tensor that changed is left out; nothing would be written.")
    if not cut:
        raise PlanError(
            f"{expert.path} changed in no matrix, so there is nothing to factor; merge it as it is."
        )
    return Layout(
        treatments=treatments,
        targets=_targets(cut, base),
        modules=modules,
        kept=kept,
        biases=any(key.endswith(".base_layer.bias") for key in kept.values()),
        task=_task(base),
    )


def _changed(base: Checkpoint, expert: Checkpoint) -> list[str]:
    missing = [name for name in base if name not in expert]
    if missing:
        raise CheckpointError(
            f"{expert.path} lacks {missing[0]!r} of {base.path} ({len(missing)} in all); name the "
            "base that it was made from."
        )
    changed: list[str] = []
    for name in expert:
        if name not in base:
            changed.append(name)
            continue
        ours, theirs = base.spec(name), expert.spec(name)
        if ours.shape != theirs.shape:
            raise CheckpointError(
                f"{expert.path}: {name} has shape {list(theirs.shape)}, but {list(ours.shape)} in "
                f"{base.path}; name the base that it was made from."
            )
        if not _equal(base, expert, name):
            changed.append(name)
    return changed


def _equal(base: Checkpoint, expert: Checkpoint, name: str) -> bool:
    numel = base.spec(name).numel
    for start in range(0, numel, _BLOCK):
        stop = min(start + _BLOCK, numel)
        ours, theirs = base.read(name, start, stop), expert.read(name, start, stop)
        wide = torch.promote_types(ours.dtype, theirs.dtype)
        if not torch.equal(ours.to(wide), theirs.to(wide)):
            return False
    return True


def _treatment(
    base: Checkpoint,
    expert: Checkpoint,
    name: str,
    *,
    whole: Sequence[str],
    leave_out: Sequence[str],
) -> Treatment:
    module, _, part = name.rpartition(".")
    if any(fnmatchcase(name, pattern) for pattern in leave_out):
        return Treatment("left out", module)
    if not module:
        raise PlanError(
            f"{name} changed, but belongs to no module that an adapter could keep; leave it out "
            f"(--leave-out {name})."
        )
    if name in base and is_tied(name, base):
        raise PlanError(
            f"{name} changed, which {base.path} uses both as embedding and as output layer, but an "
            f"adapter changes one of them only; leave it out (--leave-out {name})."
        )
    spec = expert.spec(name)
    if any(fnmatchcase(name, pattern) for pattern in whole) or name not in base:
        return Treatment("whole", module)
    if part != "weight" or len(spec.shape) < 2 or not is_mergeable(spec.dtype):
        return Treatment("whole", module)
    if _EMBEDDING.search(name) and len(spec.shape) == 2:
        return Treatment("embedding", module)
    if (base.config or {}).get("model_type") in _TURNED_TYPES:
        # one flag says for all modules that they are turned, so the others have no factors
        return Treatment("turned" if _TURNED.search(name) else "whole", module)
    return Treatment("matrix", module)


def _kept(
    expert: Checkpoint, treatments: Mapping[str, Treatment], cut: frozenset[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the keys of tensors to keep whole, and the modules that these are of.

    PEFT keeps all of a module or nothing, and finds modules by the end of their names.
    """
    kept: dict[str, str] = {}
    modules: list[str] = []
    for name, how in treatments.items():
        if how.kind != "whole":
            continue
        if how.module not in cut:
            modules.append(how.module)
        elif name.endswith(".bias"):
            kept[name] = f"{PREFIX}{how.module}.base_layer.bias"
        else:
            raise PlanError(
                f"{name} changed beside the matrix of its module, which an adapter cannot keep; "
                f"keep the module whole (--whole '{how.module}.*') or leave it out."
            )
    for name in expert:
        owner = name.rpartition(".")[0]
        if owner and any(owner.endswith(module) for module in modules):
            if owner in cut:
                raise PlanError(
                    f"{owner} has factors, but PEFT would keep it whole, since its name ends as "
                    f"that of another module that changed; add --whole '{owner}.*'."
                )
            how = treatments.get(name)
            if how is not None and how.kind == "left out":
                raise PlanError(
                    f"{name} is to be left out, but its module {owner} is kept whole; leave the "
                    f"module out (--leave-out '{owner}.*')."
                )
            kept[name] = f"{PREFIX}{name}"
    return kept, tuple(dict.fromkeys(modules))


def _targets(modules: Sequence[str], base: Checkpoint) -> tuple[str, ...]:
    """Return the last words of the modules' names where these mean no other module, else names."""
    wanted = set(modules)
    by_word: dict[str, set[str]] = {}
    for name in base:
        owner = name.rpartition(".")[0]
        while owner:  # modules that hold modules count: PEFT looks at their names too
            outer, _, word = owner.rpartition(".")
            by_word.setdefault(word, set()).add(owner)
            owner = outer
    targets: set[str] = set()
    for module in modules:
        word = module.rpartition(".")[2]
        # a number may also be that of a module without tensors, such as an activation
        alone = by_word[word] <= wanted and not word.isdecimal()
        targets.add(word if alone else module)
    return tuple(sorted(targets))


def _task(base: Checkpoint) -> str | None:
    classes = cast("list[object]", (base.config or {}).get("architectures") or [])
    for ending, task in _TASKS.items():
        if any(str(name).endswith(ending) for name in classes):
            return task
    return None
