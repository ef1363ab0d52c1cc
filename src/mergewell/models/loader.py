"""Loader: the only place that makes an `nn.Module`, and puts a checkpoint's weights into it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergewell.errors import ModelError
from mergewell.models.places import Place, filled, place_of

_WRAPPERS = ("module.", "model.", "_orig_mod.")
"""What DataParallel, training frameworks and torch.compile put before every name."""


@dataclass(frozen=True, slots=True)
class ModuleSource:
    """Where a module's architecture comes from; plain data, so that it can be sent to workers."""

    kind: Literal["huggingface", "factory", "timm"]

    location: str
    """A folder, `package.module:function`, or the name of a timm model."""

    @classmethod
    def parse(cls, text: str | Path) -> ModuleSource:
        """Return the source that a folder, `timm:NAME` or `package.module:function` names.

        Raises:
            ModelError: it is none of the three.
        """
        name = str(text)
        if Path(name).is_dir():
            return cls("huggingface", name)
        if name.startswith("timm:"):
            return cls("timm", name.removeprefix("timm:"))
        module, colon, function = name.rpartition(":")
        if colon and all(part.isidentifier() for part in (*module.split("."), function)):
            return cls("factory", name)
        raise ModelError(
            f"{name!r} names no model: give a Hugging Face folder, 'timm:NAME' or "
            "'package.module:function'."
        )

    def build(self) -> nn.Module:
        """Return a new module on the CPU, in eval mode and float32, with whatever weights.

        Nothing is downloaded, no remote code is run, and torch's random state is left as it was.

        Raises:
            ModelError: the library or the architecture is missing, or no module comes out.
        """
        makers = {"huggingface": _hugging_face, "factory": _from_factory, "timm": _from_timm}
        with torch.random.fork_rng(devices=[]):
            module = makers[self.kind](self.location)
        if not isinstance(module, nn.Module):
            raise ModelError(
                f"{self.location} returned {type(module).__name__} and not an nn.Module; "
                "return the module itself."
            )
        return module.float().eval()


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading left alone, by name, so that nothing is dropped silently."""

    left_out: tuple[str, ...]
    """Names of the checkpoint for parts that the module does not have, such as a head."""

    kept: tuple[str, ...]
    """Names of the module that it keeps because they do not act in eval mode (batch counters)."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Where a checkpoint's tensors go in a module."""

    places: Mapping[str, Place]
    """By the checkpoint's names, of all that is not left out."""

    loaded: Loaded


def load_state(module: nn.Module, checkpoint: Mapping[str, Tensor]) -> Loaded:
    """Copy a checkpoint's tensors into a module, strictly, and return what was left alone.

    Names may carry, or lack, the prefix of a Hugging Face base model, of DataParallel and the
    like; experts of a mixture that are stored one by one go into the module's stacks. The only
    names of the checkpoint that may be left out are those of whole branches that the module does
    not have (a head, a pooler) and of buffers that it recomputes; they are
    returned. Tensors are read one at a time and cast to the module's dtype.

    Raises:
        ModelError: names are missing or unexpected, or a tensor has another shape; the first names
            and the counts are given. Nothing is copied unless all names fit.
    """
    targets = module.state_dict(keep_vars=True)
    fit = fitted(module, list(checkpoint))
    with torch.no_grad():
        for name, place in fit.places.items():
            target = place.of(targets[place.name])
            tensor = checkpoint[name]
            require_shape(name, tuple(tensor.shape), target)
            target.copy_(tensor)
    return fit.loaded


def fitted(module: nn.Module, names: Sequence[str]) -> Fit:
    """Return where the tensors of these names go in a module, as `load_state` puts them.

    Raises:
        ModelError: names are missing or unexpected.
    """
    targets = module.state_dict(keep_vars=True)
    places = _placed(list(names), targets, module)
    branches = {name.partition(".")[0] for name in targets}
    recomputed = {name for name, _ in module.named_buffers()} - set(targets)
    strangers = [name for name, place in places.items() if place.name not in targets]
    left_out = [
        name
        for name in strangers
        if places[name].name in recomputed or _branch(places[name].name) - branches
    ]
    held = {id(targets[name]) for name in filled(places.values(), targets)}
    absent = [name for name, tensor in targets.items() if id(tensor) not in held]
    kept = [name for name in absent if name.rpartition(".")[2] == "num_batches_tracked"]
    complaints = [
        _count("missing", [name for name in absent if name not in kept]),
        _count("unexpected", [name for name in strangers if name not in left_out]),
    ]
    if any(complaints):
        raise ModelError(
            f"The checkpoint does not fit {type(module).__name__}: "
            f"{' and '.join(filter(None, complaints))}; "
            "name the model that these weights were saved from."
        )
    found = {name: place for name, place in places.items() if place.name in targets}
    return Fit(found, Loaded(tuple(left_out), tuple(kept)))


def placed(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the module's parameter or buffer for each name of a checkpoint that it has one for.

    Names are matched as `load_state` matches them.

    Raises:
        ModelError: one is stored alone that the module has in a stack (experts of a mixture).
    """
    targets = module.state_dict(keep_vars=True)
    places = _placed(list(names), targets, module)
    for name, place in places.items():
        if place.expert is not None:
            raise ModelError(
                f"{name} is a part of {place.name} in {type(module).__name__}, which is not done "
                "yet where single tensors of the module are asked for; merge it by its weights."
            )
    return {name: targets[p.name] for name, p in places.items() if p.name in targets}


def require_shape(name: str, shape: tuple[int, ...], target: Tensor) -> None:
    """Raise ModelError unless a checkpoint's tensor has its target's shape."""
    if shape != tuple(target.shape):
        raise ModelError(
            f"{name} has shape {shape} in the checkpoint but {tuple(target.shape)} "
            "in the module; name the model that these weights were saved from."
        )


def _placed(names: list[str], targets: Mapping[str, Tensor], module: nn.Module) -> dict[str, Place]:
    """Return the place for each name, under the prefix rule that fits the most."""
    family = getattr(module, "base_model_prefix", "")
    prefixes = [*([f"{family}."] if family else []), *_WRAPPERS]
    rules = [{name: place_of(name, targets) for name in names}]
    for prefix in prefixes:
        rules.append({name: place_of(name.removeprefix(prefix), targets) for name in names})
        # names that fit as they stand (a head's, beside a base without its prefix) are left alone
        rules.append(
            {
                name: rules[0][name]
                if rules[0][name].name in targets
                else place_of(prefix + name, targets)
                for name in names
            }
        )
    distinct = [rule for rule in rules if len(set(rule.values())) == len(names)]
    return max(distinct, key=lambda rule: len({p for p in rule.values() if p.name in targets}))


def _branch(name: str) -> set[str]:
    """Return the branch a name belongs to; layers that only have a number are none."""
    branch, dot, _ = name.partition(".")
    return {branch} if dot and not branch.isdigit() else set()


def _count(word: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {word} ({', '.join(names[:3])}{more})"


def _hugging_face(folder: str) -> Any:
    transformers = _library("transformers", f"the Hugging Face folder {folder}")
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} holds no config.json that transformers understands "
            f"({_first_line(error)}); give a Hugging Face model folder."
        ) from error
    config.dtype = torch.float32
    for name in config.architectures or ():
        architecture = getattr(transformers, name, None)
        if architecture is not None:
            # a pooler is seldom trained and would only add names that checkpoints lack
            plain = "add_pooling_layer" in inspect.signature(architecture).parameters
            return architecture(config, **({"add_pooling_layer": False} if plain else {}))
    try:
        return transformers.AutoModel.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(
            f"{folder}: transformers has no architecture {config.architectures or 'named'} for "
            f"{config.model_type!r}; install a release that has it, or give a model factory."
        ) from error


def _from_factory(name: str) -> Any:
    module_name, _, function_name = name.rpartition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(
            f"The model factory {name} cannot be imported ({_first_line(error)}); install its "
            "package or put its folder on PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ModelError(
            f"{module_name} has no function {function_name!r}; name one that takes no arguments "
            "and returns the module."
        )
    return function()


def _from_timm(name: str) -> Any:
    timm = _library("timm", f"the model timm:{name}")
    try:
        return timm.create_model(name, pretrained=False)
    except RuntimeError as error:
        raise ModelError(
            f"timm has no model {name!r} ({_first_line(error)}); see timm.list_models()."
        ) from error


def _library(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"{purpose[0].upper()}{purpose[1:]} needs {name}, which is not installed: "
            f"pip install 'mergewell[models]' {'' if name == 'transformers' else name}".rstrip()
            + "."
        ) from error
    except RuntimeError as error:  # a part of it does not fit to another, such as torchvision
        raise ModelError(
            f"{name}, which {purpose} needs, is broken ({_first_line(error)}); install it again."
        ) from error


def _first_line(error: Exception | Iterable[str]) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
