"""Walk: run several models over all batches, one piece of every model in memory at a time.

Every forward pass runs in a coroutine that stops where a piece is called. When all batches have
come to a piece, its weights are read for every model, the calls are carried out here, one after
the other, and the weights are let go of. What the model's own code does between two pieces it
does as ever, so nothing has to be known of its architecture.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mergewell.errors import ModelError
from mergewell.models.coroutine import Coroutine, running
from mergewell.models.cut import Piece, cut
from mergewell.models.dataflow import Batch, call, evaluating
from mergewell.models.heap import give_back, settle
from mergewell.models.skeleton import Fetching, Skeleton
from mergewell.models.spill import Spill

AROUND = 2 << 30
"""Bytes of weights, of all models together, up to which they are read once and kept."""

LANES = 1024
"""Forward passes that wait at a time, each in a thread; more batches walk in several groups."""


class Call(NamedTuple):
    """A forward pass wants a module to be called."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Wanted(NamedTuple):
    """A forward pass uses weights outside the modules that own them."""

    weights: list[Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """One batch has been through one module of every model, or through to the end."""

    module: str | None
    """Name of the module; None at the end of the forward pass."""

    visit: int
    """How often the batch has been at this module, from 1 on."""

    is_block: bool
    """Whether the module is one of the network's blocks."""

    index: int
    """The batch's number."""

    batch: Batch

    outputs: Mapping[str, Any]
    """What the module returned, or the whole model at the end, by the models' names."""


Around = Callable[[str, str, Batch], AbstractContextManager[object]]
"""Opened while a model (its name) calls a module (its name) on a batch."""

Before = Callable[[str, Mapping[int, Mapping[str, Call]]], object]
"""Called with a module's name and, by batch and model, the calls of it that wait."""


@dataclass(slots=True)
class _Lane:
    """One model's forward pass of one batch."""

    coroutine: Coroutine
    visits: dict[str, int] = field(default_factory=dict[str, int])


class Walk:
    """The models, cut into pieces, and the batches they are run on."""

    def __init__(
        self,
        models: Mapping[str, Skeleton],
        batches: Sequence[Batch],
        *,
        spill: Spill,
        around: Around | None = None,
        before: Before | None = None,
        together: Mapping[str, Sequence[str]] | None = None,
        keep_below: int = AROUND,
    ) -> None:
        """Prepare; nothing is read before the first step.

        Models must have one architecture. `around` is opened for each call of a piece's module;
        `before` is called when all batches have come to it and its weights are there.
        `together` names, for some modules, others whose weights must be there at the same time.
        Where all weights of all models take no more than `keep_below` bytes they are read once.
        """
        self._models, self._batches, self._spill = models, batches, spill
        self._around, self._before = around or _nothing_around, before
        self._pieces = cut(next(iter(models.values())).module)
        self._piece_of = {name: piece for piece in self._pieces for name in piece.modules}
        self._also = {piece: _also(piece, together or {}) for piece in self._pieces}
        self._keeps = sum(skeleton.nbytes for skeleton in models.values()) <= keep_below
        self._loaded: tuple[str, ...] = ()
        self._tried: set[tuple[str, str]] = set()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces, in the order in which the network holds them."""
        return self._pieces

    @property
    def length(self) -> int:
        """Number of steps, if every module is called once."""
        return len(self._batches) * (1 + len(self._piece_of))

    def steps(self) -> Generator[Step]:
        """Yield a step for each batch at each module, and one for each batch at its end.

        Close the generator (`contextlib.closing`) where it may not run to its end: its threads
        end then, the modules are as they were, and no weight stays in memory.

        Raises:
            ModelError: models go different ways through the network, or one runs its modules in
                another precision (autocast) than they are run in here.
            UserError: what the checkpoints raise when they are read.
            Exception: whatever a module's forward pass raises.
        """
        with ExitStack() as stack:
            stack.callback(self._release)
            stack.enter_context(evaluating([s.module for s in self._models.values()]))
            lanes: dict[int, dict[str, _Lane]] = {}
            stack.callback(_close, lanes)
            for skeleton in self._models.values():
                stack.enter_context(_stops(skeleton.module, self._piece_of))
            if self._keeps:
                settle()
                self._load(("",))
            together = max(1, LANES // len(self._models))
            for first in range(0, len(self._batches), together):
                for index in range(first, min(first + together, len(self._batches))):
                    self._begin(lanes, index)
                while lanes:
                    yield from self._round(lanes)

    def _begin(self, lanes: dict[int, dict[str, _Lane]], index: int) -> None:
        """Let every model's forward pass of a batch run to its first stop."""
        lanes[index] = {}
        for name, skeleton in self._models.items():
            lane = _Lane(Coroutine(_forward(skeleton, self._batches[index], self._keeps)))
            lanes[index][name] = lane
            self._go_on(name, lane, None)

    def _round(self, lanes: dict[int, dict[str, _Lane]]) -> Generator[Step]:
        """Carry out the call that the first batch waits for, for every batch that waits there."""
        here = next(iter(lanes.values()))
        name = _place(here)
        if name is not None and not self._keeps:
            self._load(self._also[self._piece_of[name]])
        if name is not None and self._before is not None:
            waiting = {
                index: {model: lane.coroutine.request for model, lane in models.items()}
                for index, models in lanes.items()
                if _place(models) == name
            }
            self._before(name, waiting)
        for index, models in list(lanes.items()):
            if _place(models) != name:
                continue
            if name is not None:
                outputs = {
                    model: self._spill.keep(self._called(model, index, lane))
                    for model, lane in models.items()
                }
                visit = next(iter(models.values())).visits[name]
                is_block = self._piece_of[name].is_block
                yield Step(name, visit, is_block, index, self._batches[index], outputs)
                for model, lane in models.items():
                    self._go_on(model, lane, outputs.pop(model))
            if _place(models) is None:  # at once: what a language model returns is large
                del lanes[index]
                results = {model: lane.coroutine.take() for model, lane in models.items()}
                yield Step(None, 1, False, index, self._batches[index], results)
                del results

    def _called(self, model: str, index: int, lane: _Lane) -> Any:
        """Return what the module returns that a forward pass waits for."""
        request: Call = lane.coroutine.request
        lane.coroutine.request = None  # so that its input is free as soon as it is used up
        skeleton = self._models[model]
        lane.visits[request.module] = lane.visits.get(request.module, 0) + 1
        module = skeleton.module.get_submodule(request.module)
        first = (model, request.module) not in self._tried
        self._tried.add((model, request.module))
        # a module may use weights that it does not own: the first call shows which
        looks = first and not self._keeps
        watching = Fetching(skeleton, skeleton.keep) if looks else nullcontext()
        with self._around(model, request.module, self._batches[index]), watching:
            return module(*request.args, **request.kwargs)

    def _go_on(self, model: str, lane: _Lane, answer: Any) -> None:
        """Let a forward pass run to the next call or to its end, giving it weights it asks for."""
        lane.coroutine.resume(answer)
        del answer
        while isinstance(lane.coroutine.request, Wanted):
            self._models[model].keep(lane.coroutine.request.weights)
            lane.coroutine.resume()

    def _release(self) -> None:
        for skeleton in self._models.values():
            skeleton.release()
        give_back()
        self._loaded = ()

    def _load(self, modules: tuple[str, ...]) -> None:
        """Have these modules' weights in memory, of every model, and no others."""
        if modules == self._loaded:
            return
        for skeleton in self._models.values():
            skeleton.drop(self._loaded)
        give_back()
        self._loaded = modules
        for skeleton in self._models.values():
            skeleton.load(modules)


def _place(models: Mapping[str, _Lane]) -> str | None:
    """Return the module that a batch waits for in all models; None when it is through."""
    waiting = {
        name: lane.coroutine.request.module if lane.coroutine.request is not None else None
        for name, lane in models.items()
    }
    (first, place), *others = waiting.items()
    for name, other in others:
        if other != place:
            raise ModelError(
                f"The models do not call their modules in the same order: {first} goes on to "
                f"{place or 'its end'}, {name} to {other or 'its end'}; compare models that do."
            )
    return place


def _forward(skeleton: Skeleton, batch: Batch, has_all: bool) -> Callable[[], Any]:
    def run() -> Any:
        coroutine = running()
        assert coroutine is not None

        def ask(weights: list[Tensor]) -> None:
            coroutine.ask(Wanted(weights))

        watching = nullcontext() if has_all else Fetching(skeleton, ask)
        with torch.inference_mode(False), torch.no_grad(), watching:
            return call(skeleton.module, batch)

    return run


@contextmanager
def _stops(module: nn.Module, names: Mapping[str, Piece]) -> Generator[None]:
    """Make the modules named hand their calls over when they are called in a coroutine."""
    with ExitStack() as stack:
        for name in names:
            part = module.get_submodule(name)
            own = vars(part).get("forward")
            part.forward = _handed_over(part.forward, name)
            stack.callback(_restore, part, own)
        yield


def _handed_over(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(forward)  # some models look at the arguments that their layers take
    def stop(*args: Any, **kwargs: Any) -> Any:
        coroutine = running()
        if coroutine is None:
            return forward(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            raise ModelError(
                f"The model calls {name} under autocast, which the walk would not see; "
                "turn autocast off in its forward pass."
            )
        return coroutine.ask(Call(name, args, kwargs))

    return stop


def _restore(part: nn.Module, own: Any) -> None:
    del part.forward
    if own is not None:
        part.forward = own


def _close(lanes: dict[int, dict[str, _Lane]]) -> None:
    for models in lanes.values():
        for lane in models.values():
            lane.coroutine.close()


def _also(piece: Piece, together: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    prefixes = tuple(f"{name}." for name in piece.modules)
    wanted = {
        other
        for name, others in together.items()
        if name in piece.modules or name.startswith(prefixes)
        for other in others
    }
    return (*piece.modules, *sorted(wanted))


def _nothing_around(_model: str, _module: str, _batch: Batch) -> AbstractContextManager[object]:
    return nullcontext()
