import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergewell.errors import CheckpointError
from mergewell.storage.base import Checkpoint
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.views import FORMAT, TaskVectorCheckpoint, write_task_vector

W = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def delta_file(path: Path, **held: torch.Tensor) -> Path:
    save_file({name.replace("__", "."): tensor for name, tensor in held.items()}, path)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    tensors = {"w": W, "b": torch.tensor([1.0, 2.0]), "other": W + 1, "n": torch.tensor(4)}
    save_file(tensors, tmp_path / "base.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    return open_checkpoint(tmp_path / "base.safetensors")


@pytest.fixture
def q() -> dict[str, torch.Tensor]:
    return {
        "w__q": torch.tensor([[1, -1], [127, 0], [2, 3]], dtype=torch.int8),
        "w__s": torch.tensor([1.0, 0.5, 0.25]),
    }


def test_an_expert_is_its_base_plus_the_task_vector(base, q, tmp_path: Path):
    path = delta_file(tmp_path / "e.safetensors", **q, b__d=torch.tensor([0.5, -2.0]).half())
    expert = open_checkpoint(path, base=base)
    assert expert["w"].tolist() == [[2.0, 1.0], [66.5, 4.0], [5.5, 6.75]]
    assert expert["b"].tolist() == [1.5, 0.0]
    assert torch.equal(expert["other"], base["other"]) and expert["n"] == 4
    assert expert.specs == base.specs and expert.shards == base.shards
    assert (expert.path, expert.files) == (path, (path,))
    assert expert.config == base.config == {"model_type": "toy"}
    assert torch.equal(pickle.loads(pickle.dumps(expert))["w"], expert["w"])


def test_reading_twice_gives_the_same(base, tmp_path: Path):
    path = delta_file(tmp_path / "e.safetensors", b__d=torch.tensor([0.5, -2.0]))
    expert = open_checkpoint(path, base=base)
    assert expert["b"].tolist() == expert["b"].tolist() == [1.5, 0.0]
    assert base["b"].tolist() == [1.0, 2.0]


@settings(deadline=None, max_examples=20)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_blocks_join_to_the_whole_bit_for_bit(
    shape: list[int],
    dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
):
    folder = tmp_path_factory.mktemp("blocks")
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, generator=generator).to(dtype)
    second = first + torch.randn(shape, generator=generator).to(dtype)
    save_file({"w": first}, folder / "base.safetensors")
    base = open_checkpoint(folder / "base.safetensors")
    write_task_vector(folder / "e.safetensors", base, {"w": second}, {})
    expert = open_checkpoint(folder / "e.safetensors", base=base)
    cuts = sorted(data.draw(st.sets(st.integers(0, first.numel()))) | {0, first.numel()})
    blocks = [expert.read("w", a, b) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(blocks), expert["w"].reshape(-1))
    assert expert["w"].dtype == dtype
    held = load_file(folder / "e.safetensors")  # the definition in data.md, in full
    delta = held["w.q"].flatten(1).float() * held["w.s"][:, None]
    compute = torch.promote_types(dtype, torch.float32)
    whole = first.to(compute) + delta.view(first.shape).to(compute)
    assert torch.equal(expert["w"], whole.to(dtype))


def test_what_is_written_reads_back_within_half_a_step(base, tmp_path: Path):
    expert = {
        "w": W + torch.tensor([[0.1, -0.2], [0, 0], [127.0, 30.4]]),
        "b": torch.tensor([1.25, 2.0]),
        "other": W + 1,
        "n": torch.tensor(4),
    }
    write_task_vector(tmp_path / "e.safetensors", base, expert, {"task": "toy"})
    held = load_file(tmp_path / "e.safetensors")
    assert sorted(held) == ["b.d", "w.q", "w.s"]
    assert held["b.d"].dtype == torch.float16
    assert held["w.q"].tolist() == [[64, -127], [0, 0], [127, 30]]
    assert held["w.s"][1:].tolist() == [0, 1]
    read = open_checkpoint(tmp_path / "e.safetensors", base=base)
    assert read.metadata == {"task": "toy", "format": FORMAT}
    assert torch.equal(read["b"], expert["b"])
    assert ((read["w"] - expert["w"]).abs() <= held["w.s"][:, None] / 2 + 1e-6).all()
    assert not list(tmp_path.glob(".*"))


def test_an_expert_equal_to_its_base_is_still_a_task_vector(base, tmp_path: Path):
    write_task_vector(tmp_path / "e.safetensors", base, dict(base), {})
    expert = open_checkpoint(tmp_path / "e.safetensors", base=base)
    assert isinstance(expert, TaskVectorCheckpoint)
    assert torch.equal(expert["w"], W)


def test_a_change_beyond_float16_is_kept(base, tmp_path: Path):
    write_task_vector(tmp_path / "e.safetensors", base, {"b": torch.tensor([1e6, 2.0])}, {})
    assert open_checkpoint(tmp_path / "e.safetensors", base=base)["b"].tolist() == [1e6, 2.0]


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"z": W}, "has no tensor 'z': known: b, n, other, w"),
        ({"w": W.T}, r"'w' has shape \[2, 3\] but the base's \[3, 2\]"),
        ({"n": torch.tensor(5)}, "'n' is not floating but differs"),
        ({"w": W * float("nan")}, "'w' has a value that is not finite"),
    ],
)
def test_an_expert_that_cannot_be_written_is_a_named_error(base, expert, message, tmp_path: Path):
    with pytest.raises(CheckpointError, match=message):
        write_task_vector(tmp_path / "e.safetensors", base, expert, {})
    assert not (tmp_path / "e.safetensors").exists()


def test_a_base_is_needed(q, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"e.safetensors is a task vector; name the base"):
        open_checkpoint(delta_file(tmp_path / "e.safetensors", **q))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z__d": torch.ones(2)}, "has no tensor 'z', known: b, n, other, w"),
        ({"b__d": torch.ones(3)}, r"'b.d' has shape \[3\] but the base's tensor \[2\]"),
        ({"w__q": torch.ones(2, 2).to(torch.int8)}, r"'w.q' has shape \[2, 2\]"),
        ({"w__q": torch.ones(3, 2)}, "'w.q' is neither int8"),
        ({"w__s": torch.ones(2)}, "'w.q' is neither int8"),
        ({"w__s": torch.ones(3).half()}, "'w.q' is neither int8"),
        ({"w__d": W}, "has both .* for one tensor|'w.d' is neither"),
        ({"b__d": torch.ones(2).int()}, "'b.d' is neither int8"),
        ({"n__d": torch.tensor(1.0)}, "'n.d' changes a tensor of dtype torch.int64"),
    ],
)
def test_a_task_vector_that_does_not_fit_is_a_named_error(
    base, q, change: dict[str, torch.Tensor], message: str, tmp_path: Path
):
    path = delta_file(tmp_path / "e.safetensors", **{**q, **change})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path, base=base)


def test_scales_without_levels_are_refused(base, q, tmp_path: Path):
    save_file({"w.s": q["w__s"]}, tmp_path / "e.safetensors", {"format": FORMAT})
    with pytest.raises(CheckpointError, match=r"'w.s' scales nothing"):
        open_checkpoint(tmp_path / "e.safetensors", base=base)


def test_other_keys_are_refused_if_the_file_claims_the_format(base, tmp_path: Path):
    save_file({"w": W}, tmp_path / "e.safetensors", {"format": FORMAT})
    with pytest.raises(CheckpointError, match=r"'w' ends in none of .q, .s, .d"):
        open_checkpoint(tmp_path / "e.safetensors", base=base)


def test_ordinary_names_with_such_an_end_are_no_task_vector(base, tmp_path: Path):
    save_file({"attention.q": W, "attention.d": W + 1}, tmp_path / "e.safetensors")
    assert not isinstance(
        open_checkpoint(tmp_path / "e.safetensors", base=base), TaskVectorCheckpoint
    )
