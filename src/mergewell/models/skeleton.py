"""Skeleton: a module whose weights are read when they are needed and let go of afterwards.

An absent weight is a tensor of the right shape and dtype whose elements all lie at one place in
memory, NaN where its dtype has one, so that what would use it by mistake cannot pass unseen.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from mergewell.models.dataflow import parts, tensors
from mergewell.models.loader import Loaded, fitted, require_shape
from mergewell.models.places import Place
from mergewell.storage.spec import TensorSpec

Read = Callable[[tuple[str, ...]], Iterable[tuple[str, Tensor]]]
"""Gives the tensors of these names in a checkpoint, in whatever order."""


class Skeleton:
    """A module without weights, and where they come from.

    Its own buffers that no checkpoint holds (rotary frequencies, position ids) are there from the
    beginning. A parameter is always the same object, whether its values are there or not.
    """

    def __init__(self, prototype: nn.Module, specs: Mapping[str, TensorSpec], read: Read) -> None:
        """Make a copy of a module without parameters, see `without_weights`.

        `specs` are the tensors of the checkpoint that `read` reads.

        Raises:
            ModelError: names or shapes do not fit the module; see `load_state`.
        """
        self.module = copy.deepcopy(prototype)
        # convolutions are quicker, and round otherwise, where the channels lie side by side
        strides = {name: t.stride() for name, t in self.module.state_dict(keep_vars=True).items()}
        _exchange(self.module, _absent_like)
        self._read = read
        self._targets = self.module.state_dict(keep_vars=True)
        self._sources, self.loaded = _sources(self.module, specs)
        held = {name: id(self._targets[name]) for name in self._targets}
        self._strides = {id(t): strides[name] for name, t in self._targets.items()}
        self._places = {target: name for name, target in held.items() if target in self._sources}
        self._absent = {id(t): _absent_like(t) for t in self._targets.values()}
        self._present: set[int] = set()
        self._kept: set[int] = set()
        for target in list(self._places):
            self._put(target, self._absent[target])

    @property
    def nbytes(self) -> int:
        """Bytes of all weights when they are there."""
        held = (self._targets[name] for name in self._places.values())
        return sum(tensor.numel() * tensor.dtype.itemsize for tensor in held)

    def load(self, modules: Iterable[str]) -> None:
        """Read the weights of modules, by their names and with all that they hold."""
        self._fetch(self._inside(modules) - self._present)

    def drop(self, modules: Iterable[str]) -> None:
        """Let go of the weights of modules, but for those that were fetched to stay."""
        for target in (self._inside(modules) & self._present) - self._kept:
            self._put(target, self._absent[target])
            self._present.discard(target)

    def missing(self, used: Iterable[Tensor]) -> list[Tensor]:
        """Return those of some tensors that are weights whose values are not there."""
        return [t for t in used if id(t) in self._places and id(t) not in self._present]

    def keep(self, weights: Iterable[Tensor]) -> None:
        """Read these weights now, and never let go of them."""
        targets = {id(weight) for weight in weights}
        self._fetch(targets - self._present)
        self._kept |= targets

    def release(self) -> None:
        """Let go of all weights."""
        self._kept.clear()
        self.drop([""])

    @contextmanager
    def filled(self) -> Generator[nn.Module]:
        """Yield the module with all weights 0, laid out as real ones are, in hardly any memory.

        For looking at the flow of data, which does not depend on values. All weights lie in one
        block of memory that is never written to, so that the system needs to find no room for it.
        """
        targets = {place: self._targets[name] for place, name in self._places.items()}
        absent = [place for place in targets if place not in self._present]
        size = max((targets[place].numel() for place in absent), default=0)
        zeros = torch.from_numpy(np.zeros(8 * size, dtype=np.uint8))  # 8: the widest element
        try:
            for place in absent:
                target = targets[place]
                count = target.numel() * target.dtype.itemsize
                laid = zeros[:count].view(target.dtype)
                self._put(place, laid.as_strided(target.shape, self._strides[place]))
            yield self.module
        finally:
            for place in absent:
                self._put(place, self._absent[place])

    def _inside(self, modules: Iterable[str]) -> set[int]:
        prefixes = tuple(f"{name}." if name else "" for name in modules)
        return {
            id(tensor)
            for name, tensor in self._targets.items()
            if name.startswith(prefixes) and id(tensor) in self._places
        }

    def _fetch(self, targets: set[int]) -> None:
        wanted = {name: target for target in targets for name in self._sources[target]}
        if not wanted:
            return
        whole: dict[int, Tensor] = {}
        for name, tensor in self._read(tuple(sorted(wanted))):
            target, values = wanted[name], tensor.detach()
            known, place = self._targets[self._places[target]], self._sources[target][name]
            strides = self._strides[target]
            if place.expert is None and values.stride() == strides:
                whole[target] = values.to(known.dtype)
                continue
            if target not in whole:
                whole[target] = torch.empty_strided(
                    known.shape, strides, dtype=known.dtype, device=values.device
                )
            place.of(whole[target]).copy_(values)
        for target, values in whole.items():
            self._put(target, values)
            self._present.add(target)

    def _put(self, target: int, values: Tensor) -> None:
        self._targets[self._places[target]].data = values


class _Asking:
    """Looks at operations before they are carried out.

    Not a part of `Fetching`, since torch would import its compiler (a second) for a mode that
    defines `__torch_dispatch__` itself.
    """

    skeleton: Skeleton
    ask: Callable[[list[Tensor]], object]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Carry out one operation, after asking for what it lacks."""
        kwargs = kwargs or {}
        if missing := self.skeleton.missing(tensors((args, kwargs))):
            self.ask(missing)
        return func(*args, **kwargs)


class Fetching(_Asking, TorchDispatchMode):
    """Asks for weights that an operation uses although their values are not there."""

    def __init__(self, skeleton: Skeleton, ask: Callable[[list[Tensor]], object]) -> None:
        """Call `ask` with the weights of `skeleton` that are missing, before they are used."""
        super().__init__()
        self.skeleton, self.ask = skeleton, ask


def _sources(
    module: nn.Module, specs: Mapping[str, TensorSpec]
) -> tuple[dict[int, dict[str, Place]], Loaded]:
    """Return what fills each tensor of the module: the checkpoint's names and their parts of it."""
    fit, targets = fitted(module, list(specs)), module.state_dict(keep_vars=True)
    found: dict[int, dict[str, Place]] = {}
    for name, place in fit.places.items():
        target = targets[place.name]
        require_shape(name, specs[name].shape, place.of(target))
        parts = found.setdefault(id(target), {})
        if place.expert is None:
            parts.clear()  # of names for one tied tensor the last counts
        parts[name] = place
    return found, fit.loaded


def without_weights(factory: Callable[[], nn.Module]) -> nn.Module:
    """Return the module that `factory` makes, in eval mode, its parameters on the meta device.

    They take no memory while it is made, unless its code looks at their values. Models keep no
    keys and values for a next token (`use_cache`): there is none, and all batches wait together.
    """

    def without_room(_module: nn.Module, _name: str, parameter: Any) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(without_room)
    try:
        with warnings.catch_warnings():  # of values that a factory copies into parameters
            warnings.simplefilter("ignore", UserWarning)
            module = factory()
    except (NotImplementedError, RuntimeError):  # its code looks at values: it gets them, once
        hook.remove()
        module = factory()
    finally:
        hook.remove()
    _exchange(module, lambda parameter: parameter.detach().to("meta"))
    module = copy.deepcopy(module)  # the factory's own configuration is left as it was
    for _, part in parts(module):
        config: Any = getattr(part, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return module.eval()


def _exchange(module: nn.Module, made: Callable[[nn.Parameter], Tensor]) -> None:
    """Replace a module's parameters; those that several modules share stay shared."""
    new: dict[int, nn.Parameter] = {}
    for _, part in parts(module):
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) not in new:
                new[id(parameter)] = nn.Parameter(made(parameter), parameter.requires_grad)
            setattr(part, name, new[id(parameter)])


def _absent_like(tensor: Tensor) -> Tensor:
    value = torch.nan if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)
