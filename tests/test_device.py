"""Merging on another device: the blocks, copies and waits are right, seen without a GPU.

`Far` simulates one. Its tensors are on a device that the CPU's do not mix with, can be worked on in
`working()` only, and its copies are carried out as late as its events allow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_guidance
import torch
from safetensors.torch import load_file
from test_blocks import SETTINGS
from test_one_hash import METHODS, digest, plan_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from toys import family, recipe_of

from mergewell.device import CPU, Event, StagedDevice, made_on, make_device
from mergewell.errors import OutputError, RecipeError
from mergewell.methods.base import METHODS as FAMILY
from mergewell.plan import make_plan
from mergewell.run import run
from mergewell.storage.manifest import read_manifest
from mergewell.tensor_group import CHUNK

FAR = torch.device("meta")  # the one device beside the CPU that every torch can name
COPY = torch.ops.aten.copy_.default
MOVE = torch.ops.aten._to_copy.default
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")


class Queue:
    """Copies that wait to be carried out, in one order, as a stream's do."""

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.done = 0

    def drain(self, until: int) -> None:
        for target, source in self.copies[self.done : until]:
            target.copy_(source)
        self.done = max(self.done, until)


class FarEvent:
    """An event in such a queue; waiting for one that was never recorded does nothing."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.mark = queue, 0

    def record(self) -> None:
        self.mark = len(self.queue.copies)

    def synchronize(self) -> None:
        self.queue.drain(self.mark)


class There(Tensor):
    """A tensor of the far device; `held` is what it holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=FAR,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of working()")


class Arithmetic(TorchDispatchMode):
    """The far device's arithmetic: the CPU's, where all tensors are there (numbers may not be)."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self.queue = queue

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, given)) if isinstance(x, Tensor)]
        far = [isinstance(t, There) for t in tensors]
        if func is COPY and any(far) and (given.get("non_blocking") or args[2:3] == (True,)):
            self.queue.copies.append((unwrapped(args[0]), unwrapped(args[1])))
            return args[0]
        if any(far):
            self.queue.drain(len(self.queue.copies))
        result_far = any(far)
        if func in (COPY, MOVE):
            result_far = far[0]
        elif any(far):
            here = [t for t, is_far in zip(tensors, far, strict=True) if not is_far and t.dim()]
            assert not here, f"{func} mixes devices: {[t.shape for t in here]} are not there"
        if given.get("device") is not None:
            result_far = given["device"] == FAR
            given["device"] = "cpu"
        result = func(*tree_map(unwrapped, args), **tree_map(unwrapped, given))
        if tensors and far[0] and result is unwrapped(tensors[0]):
            return tensors[0]
        return (
            tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, result)
            if (result_far)
            else result
        )


class GivenNumbers(TorchFunctionMode):
    """`torch.tensor` on the far device: torch itself would drop the numbers on a meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and given.get("device") == FAR:
            return There(func(*tree_map(unwrapped, args), **{**given, "device": "cpu"}))
        return func(*args, **given)


def unwrapped(value: Any) -> Any:
    return value.held if isinstance(value, There) else value


class Far(StagedDevice):
    """A device that is far away."""

    def __init__(self) -> None:
        super().__init__("far", FAR)
        self.queues = threading.local()
        self.allocated: list[tuple[int, int]] = []
        self.uploads = 0

    def queue(self) -> Queue:
        if not hasattr(self.queues, "own"):
            self.queues.own = Queue()
        return self.queues.own

    def new_memory(self, size: int) -> Tensor:
        self.allocated.append((threading.get_ident(), size))
        return torch.zeros(size, dtype=torch.uint8, device="cpu")

    def new_event(self) -> Event:
        return FarEvent(self.queue())

    @contextmanager
    def working(self) -> Generator[None]:
        with Arithmetic(self.queue()), GivenNumbers(), made_on(self.where):
            yield

    def up(self, tensor: Tensor) -> Tensor:
        assert not isinstance(tensor, There)
        self.uploads += 1
        return super().up(tensor)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_another_device_gives_the_bytes_of_the_fused_forms(
    tmp_path: Path, method: dict[str, Any]
) -> None:
    plan, device = plan_of(tmp_path, method), Far()
    run(plan, tmp_path / "here", workers=2)
    manifest = run(plan, tmp_path / "there", workers=2, block=CHUNK, device=device)
    assert digest(tmp_path / "there") == digest(tmp_path / "here")
    assert device.uploads > 30
    assert manifest.versions["device"] == "far"
    assert read_manifest(tmp_path / "here").versions["device"] == "cpu"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return family(tmp_path_factory.mktemp("models"), experts=3)


@pytest.mark.parametrize("method", SETTINGS, ids=lambda m: "-".join(map(str, m.values())))
def test_no_method_mixes_devices(
    tmp_path: Path, models: tuple[Path, list[Path]], method: dict[str, Any]
) -> None:
    settings = {key: value for key, value in method.items() if key != "name"}
    count = FAMILY.build(method["name"], settings).needs.experts or 3
    base, experts = models
    plan = make_plan(recipe_of(base, experts[:count], method))
    for name, device in (("here", CPU), ("there", Far())):
        run(plan, tmp_path / name, workers=1, block=CHUNK, device=device)
    assert digest(tmp_path / "there") == digest(tmp_path / "here")


@pytest.mark.parametrize("name", ["m_ties", "m_dare"])
@pytest.mark.parametrize("budget", ["neutral", "layer_aware", "random", "uniform"])
def test_a_calibration_guides_there_too(tmp_path: Path, name: str, budget: str) -> None:
    of = test_guidance.models(tmp_path)
    calibrated = test_guidance.calibration(tmp_path / "c.safetensors", of)
    plan = test_guidance.planned(of, calibrated, {"name": name, "budget": budget, "density": 0.5})
    for folder, device in (("here", CPU), ("there", Far())):
        run(plan, tmp_path / folder, workers=1, block=8, device=device)
    assert digest(tmp_path / "there") == digest(tmp_path / "here")


def test_a_thread_has_two_buffers_that_grow_and_are_waited_for() -> None:
    device = Far()
    sent = [torch.full((size,), float(size)) for size in (3, 5, 4, 9, 2, 7)]
    there = [device.up(tensor) for tensor in sent]
    assert device.allocated == [(threading.get_ident(), 4 * size) for size in (3, 5, 4, 9)]
    for tensor, placed in zip(sent, there, strict=True):
        assert isinstance(placed, There)
        assert placed.device == FAR
        assert torch.equal(device.down(placed), tensor)
    other = threading.Thread(target=lambda: device.up(torch.ones(1)))
    other.start()
    other.join()
    assert len({thread for thread, _ in device.allocated}) == 2


def test_of_a_state_only_what_is_asked_for_is_brought_up_and_once() -> None:
    device = Far()
    state = {"a:key": torch.arange(3), "b:key": torch.arange(4)}
    there = device.all_up(state)
    assert "b:key" in there and "c:key" not in there and list(there) == list(state)
    assert len(there) == 2 and device.uploads == 0
    assert there["a:key"] is there["a:key"] and there.get("c:key") is None
    assert device.uploads == 1
    assert torch.equal(device.all_down(there)["b:key"], torch.arange(4))
    assert CPU.all_up(state) is state


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(0, 3), torch.tensor(7), torch.ones(2, 3).bool(), torch.arange(6).view(2, 3).T],
    ids=["empty", "number", "bool", "transposed"],
)
def test_tensors_of_any_kind_come_back(tensor: Tensor) -> None:
    device = Far()
    back = device.down(device.up(tensor))
    assert not isinstance(back, There) and back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_a_run_goes_on_on_a_device_of_the_same_kind_only(
    tmp_path: Path, models: tuple[Path, list[Path]]
) -> None:
    base, experts = models
    plan = make_plan(recipe_of(base, experts, {"name": "average"}, shard_bytes=100_000))

    class StoppedError(Exception):
        pass

    def stop(count: int, seen: list[int] = []) -> None:  # noqa: B006
        seen.append(count)
        if len(seen) > 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(plan, tmp_path / "out", workers=1, device=Far(), on_progress=stop)
    with pytest.raises(OutputError):
        run(plan, tmp_path / "out", workers=1, resume=True)
    run(plan, tmp_path / "out", workers=1, resume=True, device=Far())
    run(plan, tmp_path / "here", workers=1)
    assert digest(tmp_path / "out") == digest(tmp_path / "here")


def test_values_that_are_not_finite_are_named(
    tmp_path: Path, models: tuple[Path, list[Path]]
) -> None:
    from toys import save

    from mergewell.errors import CheckpointError

    base, experts = models
    state = load_file(experts[0] / "model.safetensors")
    state["layer.0.weight"][1, 2] = float("nan")
    broken = save(tmp_path / "broken", state)
    plan = make_plan(recipe_of(base, [broken, experts[1]], {"name": "average"}))
    with pytest.raises(CheckpointError, match=r"layer\.0\.weight holds 1 NaN"):
        run(plan, tmp_path / "out", device=Far())
    assert not (tmp_path / "out").exists()


def test_cpu_is_itself() -> None:
    assert make_device("cpu") is CPU
    tensor = torch.ones(2)
    assert CPU.up(tensor) is tensor and CPU.down(tensor) is tensor


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("cud", "did you mean 'cuda'"), ("gpu0:", "known: cpu, cuda"), ("cuda:x", "did you mean"),
     ("cuda:-1", "did you mean"), ("", "known")],
)  # fmt: skip
def test_unknown_devices_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        make_device(name)


def test_an_index_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: f"Toy {where.index}")
    assert make_device("cuda").name.startswith("Toy 0 (CUDA ")
    assert make_device("cuda:1").name.startswith("Toy 1 (CUDA ")
    with pytest.raises(RecipeError, match=r"cuda:2: the last CUDA device here is cuda:1"):
        make_device("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none_is_one_sentence(
    name: str, tmp_path: Path, models: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    from mergewell.cli.main import main

    base, experts = models
    given = ["merge", "--base", str(base), "--expert", str(experts[0]), "--out"]
    assert main([*given, str(tmp_path / "out"), "--device", name]) == 2
    error = capsys.readouterr().err
    assert f"--device {name}: torch" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecipeError, match="no CUDA device"):
        run(make_plan(recipe_of(base, experts, {"name": "average"})), tmp_path / "o", device=name)
    assert list(tmp_path.iterdir()) == []


def test_shard_jobs_and_ray_stay_on_the_cpu(
    tmp_path: Path, models: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from mergewell.cli import merge as commands
    from mergewell.cli.main import main

    def far(name: str) -> Far:
        return Far()

    chosen: Callable[[str], Any] = far
    monkeypatch.setattr(commands, "make_device", chosen)
    base, experts = models
    given = ["merge", "--base", str(base), "--expert", str(experts[0]), "--device", "cuda"]
    given += ["--out", str(tmp_path / "out")]
    for more in (["--shard", "0/2"], ["--engine", "ray"]):
        assert main([*given, *more]) == 2
        assert f"--device cuda and {more[0]}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(given) == 0
    assert read_manifest(tmp_path / "out").versions["device"] == "far"


def steps_apart(left: Tensor, right: Tensor) -> int:
    """Return how many steps of bfloat16 two tensors lie apart at most."""
    keys = [t.view(torch.int16).int() for t in (left, right)]
    ordered = [torch.where(key < 0, -(key & 0x7FFF), key) for key in keys]
    return int((ordered[0] - ordered[1]).abs().max()) if left.numel() else 0


def test_steps_are_counted_across_zero() -> None:
    left = torch.tensor([1.0, 0.0, -1e-40]).bfloat16()
    assert steps_apart(left, left) == 0
    assert steps_apart(left[:1], torch.tensor([1.0078125]).bfloat16()) == 1
    assert steps_apart(left[1:2], torch.tensor([-0.0]).bfloat16()) == 0


@needs_cuda
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_cuda_is_the_cpu_to_one_step(tmp_path: Path, method: dict[str, Any]) -> None:
    plan = plan_of(tmp_path, method)
    run(plan, tmp_path / "cpu", workers=2)
    for index in range(2):
        run(plan, tmp_path / f"cuda{index}", workers=2, block=CHUNK, device="cuda")
    assert digest(tmp_path / "cuda0") == digest(tmp_path / "cuda1")
    for file in (tmp_path / "cpu").glob("*.safetensors"):
        left, right = (load_file(tmp_path / d / file.name) for d in ("cpu", "cuda0"))
        assert all(steps_apart(left[name], right[name]) <= 1 for name in left), method
