"""Block by block gives what the plain forward pass gives, and leaves nothing behind."""

import threading
import weakref
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, cnn, images, randomised, skeleton
from torch import nn

from mergewell.errors import ModelError
from mergewell.models import walk as walking
from mergewell.models.dataflow import call, evaluating, tensors
from mergewell.models.spill import Spill
from mergewell.models.walk import Walk


def walked(models, batches, tmp_path: Path, **more):
    """Return all steps, having checked that nothing is left behind."""
    before = threading.active_count()
    with Spill(0, tmp_path) as spill:
        walk = Walk(models, batches, spill=spill, **more)
        with closing(walk.steps()) as steps:
            found = [(step, dict(step.outputs)) for step in steps]
    assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []
    for bones in models.values():
        assert all(parameter.isnan().all() for parameter in bones.module.parameters())
        assert not any("forward" in vars(part) for part in bones.module.modules())
    return walk, found


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("keep", [0, 1 << 40])
def test_a_walk_equals_plain_forward_passes(name: str, keep: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    factory, inputs = ARCHITECTURES[name]
    batches = [inputs(3), inputs(3), inputs(2)]
    states = {model: randomised(factory(), seed, 0.1) for seed, model in enumerate("ab")}
    models = {model: skeleton(factory, state) for model, state in states.items()}
    walk, found = walked(models, batches, tmp_path, keep_below=keep)
    assert len(found) == walk.length
    ends = [(step, outputs) for step, outputs in found if step.module is None]
    assert [step.index for step, _ in ends] == [0, 1, 2]
    assert sum(step.is_block for step, _ in found) == 9
    for model, state in states.items():
        plain = factory()
        plain.load_state_dict(state, strict=False)
        for step, outputs in ends:
            with evaluating([plain]):
                wanted = tensors(call(plain, batches[step.index]))
            got = tensors(outputs[model])
            assert torch.equal(got[0], wanted[0])


def test_each_weight_is_read_once_however_many_batches(tmp_path: Path) -> None:
    state = randomised(cnn(), 1, 0.1)
    bones, read = skeleton(cnn, state), []
    bones._read = lambda names: read.extend(names) or ((n, state[n]) for n in names)
    walked({"a": bones}, [images(2) for _ in range(4)], tmp_path, keep_below=0)
    assert sorted(read) == sorted(n for n in state if "num_batches" not in n or n in read)
    assert len(read) == len(set(read))


def test_results_do_not_wait_for_one_another(tmp_path: Path) -> None:
    """Logits of a language model are larger than all that waits between its blocks."""
    bones, seen = skeleton(cnn, randomised(cnn(), 1, 0.1)), []
    with Spill(0, tmp_path) as spill:
        for step in Walk({"a": bones}, [images(2) for _ in range(3)], spill=spill).steps():
            assert [one() for one in seen] == [None] * len(seen)
            if step.module is None:
                seen.append(weakref.ref(step.outputs["a"]))
            del step
    assert len(seen) == 3


def test_many_batches_walk_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "LANES", 4)
    state = randomised(cnn(), 1, 0.1)
    models, batches = {k: skeleton(cnn, state) for k in "ab"}, [images(1) for _ in range(5)]
    alive: list[int] = []
    before = threading.active_count()
    with Spill(0, tmp_path) as spill:
        for step in Walk(models, batches, spill=spill, keep_below=0).steps():
            alive.append(threading.active_count() - before)
            if step.module is None:
                assert torch.equal(step.outputs["a"], step.outputs["b"])
    assert max(alive) == 4 and len(alive) == 5 * 7


class Twice(nn.Module):
    """Calls one block twice, uses a weight of another module, and has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.table = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x * self.scale)
        x = self.blocks[1](x)
        return nn.functional.linear(self.blocks[0](x), self.table.weight)


def test_a_block_called_twice_and_weights_used_outside_their_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = randomised(Twice(), 1, 0.5)
    batches = [torch.randn(3, 4) for _ in range(3)]
    _, found = walked({"a": skeleton(Twice, state)}, batches, tmp_path, keep_below=0)
    visits = [(step.module, step.visit) for step, _ in found if step.index == 0]
    assert visits == [("blocks.0", 1), ("blocks.1", 1), ("blocks.0", 2), (None, 1)]
    plain = Twice()
    plain.load_state_dict(state)
    for step, outputs in found:
        if step.module is None:
            assert torch.equal(outputs["a"], plain(batches[step.index]))


class Lending(nn.Module):
    """Its second block uses the first one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.blocks[1].forward = lambda x: x @ self.blocks[0][0].weight

    def __deepcopy__(self, memo: object) -> nn.Module:
        copied = Lending()
        for name, part in copied.named_modules():
            for key, value in self.get_submodule(name).named_parameters(recurse=False):
                setattr(part, key, nn.Parameter(value.detach().clone()))
        return copied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x))


def test_a_block_may_use_the_weight_of_another(tmp_path: Path) -> None:
    state = randomised(Lending(), 1, 0.5)
    plain, x = Lending(), torch.randn(3, 4)
    plain.load_state_dict(state)
    models = {"a": skeleton(Lending, state)}
    own = models["a"].module.blocks[1].forward
    with Spill(0, tmp_path) as spill:
        steps = list(Walk(models, [x, 2 * x], spill=spill, keep_below=0).steps())
    for step in steps:
        if step.module is None:
            assert torch.equal(step.outputs["a"], plain((1 + step.index) * x))
    assert models["a"].module.blocks[1].forward is own  # what stood there stands there again


class Failing(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.where = where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        if self.where == "between" and bool((x > 1e6).any()):
            raise ZeroDivisionError("between")
        if self.where == "inside":
            x = x[:, :3]  # the next linear layer cannot take it
        if self.where == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.blocks[1](x)
        return self.blocks[1](x)


@pytest.mark.parametrize(
    ("where", "error"),
    [("between", ZeroDivisionError), ("inside", RuntimeError), ("autocast", ModelError)],
)
def test_errors_surface_and_nothing_is_left(where: str, error, tmp_path: Path) -> None:
    models = {k: skeleton(lambda: Failing(where), randomised(Failing(where), 1, 0.1)) for k in "ab"}
    batches = [torch.ones(2, 4), 1e9 * torch.ones(2, 4), torch.ones(2, 4)]
    before = threading.active_count()
    with pytest.raises(error):
        walked(models, batches, tmp_path, keep_below=0)
    assert threading.active_count() == before
    for bones in models.values():
        assert all(parameter.isnan().all() for parameter in bones.module.parameters())
        assert not any("forward" in vars(part) for part in bones.module.modules())
    assert list(tmp_path.iterdir()) == []


def test_whoever_stops_early_leaves_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    bones = skeleton(cnn, randomised(cnn(), 1, 0.1))
    with Spill(0, tmp_path) as spill:
        with closing(Walk({"a": bones}, [images(2)] * 3, spill=spill).steps()) as steps:
            next(steps)
            assert threading.active_count() == before + 3
        assert threading.active_count() == before
    assert not any("forward" in vars(part) for part in bones.module.modules())


class Routed(nn.Module):
    """Goes one of two ways, as its weights say."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        return self.blocks[1](x) if float(x.sum()) > 0 else x


def test_models_that_go_different_ways_are_refused(tmp_path: Path) -> None:
    up = {n: torch.ones_like(t) for n, t in Routed().state_dict().items()}
    down = {n: -t for n, t in up.items()}
    models = {"base": skeleton(Routed, up), "expert 1": skeleton(Routed, down)}
    with pytest.raises(ModelError, match=r"base goes on to blocks\.1, expert 1 to its end"):
        walked(models, [torch.ones(2, 4)], tmp_path)


def test_the_surroundings_see_every_call_and_its_weights(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []
    bones = skeleton(cnn, randomised(cnn(), 1, 0.1))

    def is_there(module: str) -> bool:
        return not any(p.isnan().any() for p in bones.module.get_submodule(module).parameters())

    @contextmanager
    def around(model: str, module: str, _batch: object):
        assert is_there(module)
        assert is_there("head") == (module in ("blocks.0", "head"))  # asked for together
        seen.append((model, module))
        yield

    together = {"blocks.0.conv1": ["head"]}
    walked({"a": bones}, [images(2)], tmp_path, keep_below=0, around=around, together=together)
    assert seen == [("a", n) for n in ("stem", "norm", "blocks.0", "blocks.1", "blocks.2", "head")]
