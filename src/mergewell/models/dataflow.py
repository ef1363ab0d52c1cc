"""Dataflow: a recording of one forward pass, operation by operation.

The module runs under a dispatch mode that sees every tensor operation, whatever Python made it,
and under hooks that say which module is innermost.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mergewell.errors import DataError, did_you_mean

Batch = Tensor | Mapping[str, Tensor]
"""What a module is called with: one tensor, or tensors by argument name."""


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Hold modules in eval mode without gradients, fused fast paths or caches, then restore them.

    torch's fused transformer layer would hide its linear layers from tracing and from hooks; a
    cache of keys and values would grow whenever another model's attention is called in a hook.
    """
    held = list(modules)
    training = [part for module in held for part in module.modules() if part.training]
    configs = {id(c): c for m in held for part in m.modules() for c in _caching(part)}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for part in training:
        part.training = False
    for config in configs.values():
        config.use_cache = False
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part in training:
            part.training = True
        for config in configs.values():
            config.use_cache = True


def _caching(part: nn.Module) -> list[Any]:
    """Return a Hugging Face module's configuration if it says that keys are to be cached."""
    config: Any = getattr(part, "config", None)
    return [config] if getattr(config, "use_cache", None) is True else []


def call(module: nn.Module, batch: Batch) -> Any:
    """Call a module with one tensor, or with tensors by argument name.

    Raises:
        DataError: it cannot be run on them; what it raised itself is the cause.
    """
    try:
        return module(**batch) if isinstance(batch, Mapping) else module(batch)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        check_names(batch, module)
        named = batch if isinstance(batch, Mapping) else {"one input": batch}
        seen = ", ".join(
            f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in named.items()
        )
        why = (str(error).splitlines() or [""])[0].rstrip(".")
        raise DataError(
            f"{type(module).__name__} cannot be run on {seen} ({type(error).__name__}: {why}); "
            "give inputs of the names, shapes and types that it takes."
        ) from error


def check_names(batch: Batch, module: nn.Module) -> None:
    """Check that a module's forward takes inputs of these names.

    Raises:
        DataError: it does not take one of them, or needs one that is not there.
    """
    parameters = inspect.signature(module.forward).parameters
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if isinstance(batch, Tensor):
        needed = needed[1:]
    else:
        main: object = getattr(module, "main_input_name", None)
        if isinstance(main, str) and "inputs_embeds" not in batch:
            needed = [main]  # transformers' modules say that they could do without any
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            for name in batch:
                if name not in parameters:
                    raise DataError(
                        f"The data hold an input {name!r} that {type(module).__name__} does not "
                        f"take: {did_you_mean(name, parameters)}"
                    )
    for name in needed:
        if isinstance(batch, Tensor) or name not in batch:
            held = "one without a name" if isinstance(batch, Tensor) else ", ".join(batch)
            raise DataError(
                f"{type(module).__name__} needs an input {name!r} that the data do not hold (they "
                f"hold {held}); add it to the file."
            )


def parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a module and all that it holds, by name, each once."""
    return list(module.named_modules())  # pyright: ignore[reportUnknownArgumentType]


def tensors(tree: object) -> list[Tensor]:
    """Return the tensors of nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [t for part in tree.values() for t in tensors(part)]  # pyright: ignore
    if isinstance(tree, tuple | list):
        return [t for part in tree for t in tensors(part)]  # pyright: ignore
    if is_dataclass(tree):
        return [t for field in fields(tree) for t in tensors(getattr(tree, field.name))]
    return []


@dataclass(slots=True, eq=False, repr=False)
class Value:
    """One version of a tensor; operations in place make a new version.

    It holds the tensor, so that its identity is never reused while recording.
    """

    tensor: Tensor
    producer: Op | None
    states: frozenset[str]
    """Names of the parameters and buffers it is made of, if of nothing else."""
    is_data: bool
    """True when it depends on the module's input."""


@dataclass(slots=True, eq=False, repr=False)
class Op:
    """One recorded operation."""

    function: Any
    name: str
    """Without overload and without the underscore of operations in place."""
    args: tuple[Any, ...]
    """With values in place of tensors; constants of one element stay as tensors."""
    kwargs: dict[str, Any]
    module: str
    inputs: list[Value]
    outputs: list[Value]
    is_view: bool
    """True when the one output holds the same elements as the first input, elsewhere."""


class _Recording:
    """What `Recorder` does.

    Apart from it, since torch would import its compiler (a second) for a mode that defines
    `__torch_dispatch__` itself.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.calls: dict[str, list[list[Value]]] = {}
        self.owners: dict[str, str] = {}
        self._stack = [""]
        self._values: dict[int, Value] = {}
        self._aliases: dict[int, list[Tensor]] = {}
        states: dict[int, tuple[Tensor, set[str]]] = {}
        for owner, part in parts(module):
            held = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            for short, tensor in held:
                name = f"{owner}.{short}" if owner else short
                self.owners[name] = owner
                states.setdefault(id(tensor), (tensor, set[str]()))[1].add(name)
        for tensor, names in states.values():
            self._keep(tensor, Value(tensor, None, frozenset(names), False))
        for tensor in inputs:
            self._keep(tensor, Value(tensor, None, frozenset(), True))

    def read(self, tensor: Tensor) -> Value:
        """Return the present version of a tensor; one never seen before is a constant."""
        value = self._values.get(id(tensor))
        return value or self._keep(tensor, Value(tensor, None, frozenset(), False))

    def states(self, value: Value, op: Op) -> frozenset[str]:
        """Return the parameters and buffers that a value is made of, as this operation sees it.

        A parameter shared by several modules counts for the module it is used in.
        """
        own = frozenset(n for n in value.states if self.owners[n] == op.module)
        return own if own and value.producer is None else value.states

    @contextmanager
    def watching(self, module: nn.Module) -> Generator[None, None, None]:
        """Follow which module is innermost, and note what each call returns."""

        def enter(name: str) -> Any:
            def hook(_part: nn.Module, _args: object) -> None:
                self._stack.append(name)

            return hook

        def leave(name: str) -> Any:
            def hook(_part: nn.Module, _args: object, output: object) -> None:
                self._stack.pop()
                self.calls.setdefault(name, []).append([self.read(t) for t in tensors(output)])

            return hook

        handles: list[Any] = []
        try:
            for name, part in parts(module):
                handles.append(part.register_forward_pre_hook(enter(name)))
                handles.append(part.register_forward_hook(leave(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Record one operation and carry it out."""
        kwargs = kwargs or {}
        inputs = [self.read(tensor) for tensor in tensors((args, kwargs))]
        held_args, held_kwargs = tree_map_only(Tensor, self._held, (args, dict(kwargs)))
        result = func(*args, **kwargs)
        name = str(func).split(".")[1]
        schema = func._schema
        op = Op(func, name.rstrip("_"), held_args, held_kwargs, self._stack[-1], [], [], False)
        op.inputs = [value for value in inputs if not _is_small_constant(value)]
        written = [
            tensor
            for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors(value)
        ]
        made = [tensor for tensor in tensors(result) if not any(tensor is w for w in written)]
        returned = schema.returns[0].alias_info if len(schema.returns) == 1 else None
        op.is_view = (
            len(made) == 1
            and len(inputs) == 1
            and made[0].numel() == inputs[0].tensor.numel()
            and made[0].dtype == inputs[0].tensor.dtype
            and (name == "_unsafe_view" or (returned is not None and not written))
        )
        self.ops.append(op)
        for tensor in made:
            self._produce(tensor, op)
        for tensor in written:
            self._overwrite(tensor, op)
        return result

    def _held(self, tensor: Tensor) -> Value | Tensor:
        value = self.read(tensor)
        return tensor.clone() if _is_small_constant(value) else value

    def _keep(self, tensor: Tensor, value: Value) -> Value:
        if id(tensor) not in self._values and tensor.layout is torch.strided:
            self._aliases.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self._values[id(tensor)] = value
        return value

    def _produce(self, tensor: Tensor, op: Op) -> None:
        is_data = any(value.is_data for value in op.inputs)
        states = [] if is_data else [self.states(value, op) for value in op.inputs]
        value = Value(tensor, op, frozenset[str]().union(*states), is_data)
        op.outputs.append(self._keep(tensor, value))

    def _overwrite(self, tensor: Tensor, op: Op) -> None:
        """Give a tensor written in place, and all that share its memory, a new version."""
        self._produce(tensor, op)
        written = self._values[id(tensor)]
        for alias in list(self._aliases.get(tensor.untyped_storage().data_ptr(), [])):
            if alias is tensor:
                continue
            same = geometry(alias) == geometry(tensor)
            before = [] if same else [self._values[id(alias)]]
            name = "alias" if same else "written through a view"
            inputs = [written, *before]
            shared = Op(None, name, tuple(inputs), {}, op.module, inputs, [], same)
            self.ops.append(shared)
            self._produce(alias, shared)


class Recorder(_Recording, TorchDispatchMode):
    """Records operations, the modules they happen in, and what modules return."""


def geometry(tensor: Tensor) -> tuple[object, ...]:
    """Return how a tensor lies in its memory; views of equal geometry hold the same elements."""
    return (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)


def _is_small_constant(value: Value) -> bool:
    return not value.is_data and not value.states and value.tensor.numel() == 1
