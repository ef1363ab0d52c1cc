"""Device: where the arithmetic of a merge is done, and how tensors get there and back.

The CPU is the reference. On any other device the torch forms run, not the fused ones, and their
arithmetic may differ from the CPU's in the last bit: the manifest names the device.
"""

from __future__ import annotations

import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mergewell.errors import RecipeError, did_you_mean

_BUFFERS = 2
"""Staging buffers of a thread: one is filled while the other is on its way."""

_FACTORIES: set[Callable[..., Any]] = {
    torch.arange,
    torch.as_tensor,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.tensor,
    torch.zeros,
}


class Device:
    """The CPU: stored tensors are there already, and fused forms take them as they are."""

    fused: bool = True
    """Whether fused forms can be used."""

    name: str = "cpu"
    """What the manifest calls it; devices of one name give the same bytes."""

    def up(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the host's memory on the device."""
        return tensor

    def down(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the device in the host's memory."""
        return tensor

    def working(self) -> AbstractContextManager[None]:
        """Return the context that all work on tensors of the device is done in.

        In it, tensors made from nothing (`torch.zeros` and the like) are made on the device.
        """
        return nullcontext()

    def all_up(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a statistic's state or value on the device, for one block's use."""
        return tensors

    def all_down(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a statistic's state or value in the host's memory."""
        return {key: self.down(tensor) for key, tensor in tensors.items()}


CPU = Device()


class _BroughtUp(Mapping[str, Tensor]):
    """Tensors that are brought up when they are first asked for.

    A state holds what belongs to all tensors of a batch; a block asks for its own.
    """

    def __init__(self, tensors: Mapping[str, Tensor], up: Callable[[Tensor], Tensor]) -> None:
        self._tensors, self._up = tensors, up
        self._there: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._there:
            self._there[key] = self._up(self._tensors[key])
        return self._there[key]

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Event(Protocol):
    """A place in a device's queue of work that one can wait for."""

    def record(self) -> None:
        """Mark the end of the work that is queued now."""

    def synchronize(self) -> None:
        """Wait until that is done; at once if nothing was ever recorded."""


class _Buffers:
    """The staging buffers of one thread, taken in turn."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events
        self.memories = [torch.empty(0, dtype=torch.uint8, device="cpu")] * len(events)
        self.turn = 0


class StagedDevice(Device):
    """A device reached through two staging buffers in each worker thread.

    A copy to the device is only queued: the thread fills its other buffer meanwhile, and waits
    for a buffer's event before it uses that buffer again. Buffers grow to the largest block.
    """

    fused = False

    def __init__(self, name: str, where: torch.device) -> None:
        """Name the device and say where torch has it."""
        self.name = name
        self.where = where
        self._threads = threading.local()

    @abstractmethod
    def new_memory(self, size: int) -> Tensor:
        """Return host memory that the device can copy from and to by itself, [size] bytes."""

    @abstractmethod
    def new_event(self) -> Event:
        """Return an event that nothing was recorded in."""

    def working(self) -> AbstractContextManager[None]:
        """Return the context in which tensors made from nothing are made on the device."""
        return made_on(self.where)

    def up(self, tensor: Tensor) -> Tensor:
        """Return a copy on the device, queued through the next staging buffer."""
        with self.working():
            placed = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.where)
            if tensor.numel():
                staged, event = self._stage(tensor)
                staged.copy_(tensor)
                placed.copy_(staged, non_blocking=True)
                event.record()
        return placed

    def down(self, tensor: Tensor) -> Tensor:
        """Return a copy in the host's memory, once all queued work on it is done."""
        with self.working():
            if not tensor.numel():
                return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            staged, event = self._stage(tensor)
            staged.copy_(tensor, non_blocking=True)
            event.record()
            event.synchronize()
            return staged.clone()

    def all_up(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a mapping that brings each tensor up when it is asked for, and once."""
        return _BroughtUp(tensors, self.up)

    def _stage(self, like: Tensor) -> tuple[Tensor, Event]:
        """Return the next staging buffer as a tensor of this shape, and its event."""
        lane = cast("_Buffers | None", getattr(self._threads, "buffers", None))
        if lane is None:
            lane = _Buffers([self.new_event() for _ in range(_BUFFERS)])
            self._threads.buffers = lane
        turn, lane.turn = lane.turn, (lane.turn + 1) % _BUFFERS
        lane.events[turn].synchronize()  # what was in it may still be on its way
        size = like.numel() * like.dtype.itemsize
        if lane.memories[turn].numel() < size:
            lane.memories[turn] = self.new_memory(size)
        return lane.memories[turn][:size].view(like.dtype).view(like.shape), lane.events[turn]


class Cuda(StagedDevice):
    """A CUDA device: pinned staging buffers, and a stream of its own for each worker thread."""

    def __init__(self, where: torch.device) -> None:
        """Use this device, given with its index."""
        version = torch.version.cuda or torch.version.hip
        super().__init__(f"{torch.cuda.get_device_name(where)} (CUDA {version})", where)

    def new_memory(self, size: int) -> Tensor:
        """Return pinned memory."""
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def new_event(self) -> Event:
        """Return an event of the current stream."""
        return torch.cuda.Event()

    @contextmanager
    def working(self) -> Generator[None]:
        """Work on this thread's stream; copies and arithmetic queue there in one order."""
        stream = cast("torch.cuda.Stream | None", getattr(self._threads, "stream", None))
        if stream is None:
            stream = self._threads.stream = torch.cuda.Stream(self.where)
        with torch.cuda.stream(stream), made_on(self.where):
            yield


class _MadeOn(TorchFunctionMode):
    """What `torch.device` is as a context, without its global variable: that one is for one thread.

    Source: torch.utils._device.DeviceContext of torch 2.13 keeps the current device in a global.
    """

    def __init__(self, where: torch.device) -> None:
        super().__init__()
        self.where = where

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in _FACTORIES and given.get("device") is None:
            given["device"] = self.where
        return func(*args, **given)


@contextmanager
def made_on(where: torch.device) -> Generator[None]:
    """Make tensors on `where` in this thread when their factory is not told a device."""
    with _MadeOn(where):
        yield


def make_device(name: str) -> Device:
    """Return the device of a name: "cpu", "cuda" (the first) or "cuda:1".

    Raises:
        RecipeError: there is no device of that name here.
    """
    if name == "cpu":
        return CPU
    found = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", name)
    if found is None:
        raise RecipeError(f"--device {name}: {did_you_mean(name, ('cpu', 'cuda', 'cuda:1'))}")
    if not torch.cuda.is_available():
        raise RecipeError(
            f"--device {name}: torch {torch.__version__} finds no CUDA device here; use cpu, or "
            "install a driver and a torch that fit the device."
        )
    index, count = int(found[1] or 0), torch.cuda.device_count()
    if index >= count:
        last = f"cuda:{count - 1}"
        raise RecipeError(
            f"--device {name}: the last CUDA device here is {last}; choose from those."
        )
    return Cuda(torch.device("cuda", index))
