import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from mergewell.errors import MergewellError, OutputError
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import hash_file, read_manifest, verify_files
from mergewell.storage.spec import DTYPES, TensorSpec
from mergewell.storage.staging import Staging
from mergewell.storage.writer import CheckpointWriter, ShardLayout, ShardWriter


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def one_file(*specs: TensorSpec) -> tuple[ShardLayout, ...]:
    return (ShardLayout("model.safetensors", specs),)


def test_the_bytes_of_a_tiny_file_are_these(tmp_path: Path, model):
    layouts = one_file(TensorSpec("w", torch.float32, (2,)), TensorSpec("n", torch.uint8, ()))
    with CheckpointWriter(tmp_path / "out", layouts, metadata={"k": "v"}, key="") as writer:
        writer.write("n", 0, torch.tensor(7, dtype=torch.uint8))
        writer.write("w", 0, torch.tensor([1.0, -2.0]))
        writer.commit(model.manifest)
    header = (
        b'{"__metadata__":{"k":"v"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"n":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}'
    )
    header += b" " * (-len(header) % 8)
    body = b"\x00\x00\x80\x3f" + b"\x00\x00\x00\xc0" + b"\x07"
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == len(header).to_bytes(8, "little") + header + body


def test_a_folder_is_written_and_read_back(tmp_path: Path, model):
    model.write(tmp_path / "deep" / "out")
    directory = tmp_path / "deep" / "out"
    checkpoint = open_checkpoint(directory)
    assert sorted(checkpoint) == sorted(model.tensors)
    for name, tensor in model.tensors.items():
        assert torch.equal(checkpoint[name], tensor) and checkpoint[name].dtype == tensor.dtype
    assert checkpoint.metadata == {"mergewell": "toy"}
    assert [shard.file for shard in checkpoint.shards] == [it.file for it in model.layouts]
    assert verify_files(directory) == []
    assert [file.name for file in directory.parent.iterdir()] == ["out"]


def test_the_manifest_lists_every_file_with_its_hash(tmp_path: Path, model):
    model.write(tmp_path / "out")
    outputs = read_manifest(tmp_path / "out").outputs
    assert [output.file for output in outputs] == [
        *(layout.file for layout in model.layouts),
        "config.json",
        "model.safetensors.index.json",
    ]
    for output in outputs:
        path = tmp_path / "out" / output.file
        assert (output.hash, output.bytes) == (hash_file(path), path.stat().st_size)


def test_sha256_on_request(tmp_path: Path, model):
    layouts = one_file(TensorSpec("w", torch.float32, (2,)))
    with CheckpointWriter(
        tmp_path / "out", layouts, metadata={}, key="", algorithm="sha256"
    ) as writer:
        writer.write("w", 0, torch.zeros(2))
        writer.commit(model.manifest)
    (output,) = read_manifest(tmp_path / "out").outputs
    assert output.hash == hash_file(tmp_path / "out" / output.file, "sha256")


@settings(deadline=None, max_examples=40)
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    ),
    seed=st.integers(0, 1000),
)
def test_the_official_library_reads_what_any_order_wrote(
    kinds: list[tuple[str, list[int]]], seed: int, tmp_path_factory: pytest.TempPathFactory
):
    directory = tmp_path_factory.mktemp("any") / "out"
    rng = random.Random(seed)
    specs = tuple(TensorSpec(f"t{i}", DTYPES[k], tuple(s)) for i, (k, s) in enumerate(kinds))
    flats, jobs = {}, []
    for spec in specs:
        content = [
            rng.randrange(2 if spec.dtype == torch.bool else 256) for _ in range(spec.nbytes)
        ]
        flats[spec.name] = torch.tensor(content, dtype=torch.uint8).view(spec.dtype)
        cut = rng.randint(0, spec.numel)
        jobs += [(spec.name, 0, cut), (spec.name, cut, spec.numel)]
    rng.shuffle(jobs)
    with CheckpointWriter(directory, one_file(*specs), metadata={}, key="") as writer:
        for name, start, stop in jobs:
            writer.write(name, start, flats[name][start:stop])
        writer.commit(
            {"recipe": {}, "inputs": [], "tensors": 0, "tensors_changed": 0}
            | {"seed": 0, "versions": {}, "seconds": 0}
        )
    read = load_file(directory / "model.safetensors")
    assert list(read) == [spec.name for spec in specs] or set(read) == set(flats)
    for spec in specs:
        assert (read[spec.name].dtype, tuple(read[spec.name].shape)) == (spec.dtype, spec.shape)
        found = read[spec.name].reshape(-1).view(torch.uint8)
        assert torch.equal(found, flats[spec.name].view(torch.uint8))
    assert verify_files(directory) == []


def test_threads_write_the_same_bytes(tmp_path: Path, model):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    layouts = one_file(TensorSpec("x", x.dtype, (64, 64)))
    hashes = set()
    for workers in (1, 8):
        directory = tmp_path / str(workers)
        with (
            CheckpointWriter(directory, layouts, metadata={}, key="") as writer,
            ThreadPoolExecutor(workers) as pool,
        ):
            starts = range(0, 4096, 16)
            list(pool.map(lambda i, w=writer: w.write("x", i, x[i : i + 16]), starts))
            writer.commit(model.manifest)
        hashes.add(hash_file(directory / "model.safetensors", "sha256"))
        assert verify_files(directory) == []
    assert len(hashes) == 1


def test_non_contiguous_blocks_are_written_in_their_order(tmp_path: Path, model):
    x = torch.arange(6.0).reshape(2, 3)
    layouts = one_file(TensorSpec("x", x.dtype, (3, 2)))
    with CheckpointWriter(tmp_path / "out", layouts, metadata={}, key="") as writer:
        writer.write("x", 0, x.T)
        writer.commit(model.manifest)
    assert torch.equal(open_checkpoint(tmp_path / "out")["x"], x.T)


def test_the_writers_metadata_are_those_of_the_official_reader(tmp_path: Path, model):
    model.write(tmp_path / "out")
    with safe_open(tmp_path / "out" / model.layouts[0].file, "pt") as file:
        assert file.metadata() == {"mergewell": "toy"}


# What must be refused


def test_an_existing_output_is_refused_and_untouched(tmp_path: Path, model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match=r"out exists already and nothing is overwritten"):
        model.writer(tmp_path / "out")
    with pytest.raises(OutputError, match=r"mine exists already"):
        model.writer(tmp_path / "out" / "mine")
    assert contents(tmp_path / "out") == {"mine": b"mine"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path: Path, model):
    (tmp_path / "out").mkdir()
    model.write(tmp_path / "out")
    assert verify_files(tmp_path / "out") == []


def test_a_name_that_is_taken_meanwhile_is_not_overwritten(tmp_path: Path, model, expected):
    def take() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")

    with pytest.raises(OutputError, match="out could not be written"):
        model.write(tmp_path / "out", before_commit=take)
    assert contents(tmp_path / "out") == {"mine": b"mine"}
    (tmp_path / "out" / "mine").unlink()
    assert model.write(tmp_path / "out", resume=True) == []
    assert contents(tmp_path / "out") == expected


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        model.writer(tmp_path / "file" / "out")


def test_a_second_writer_is_refused(tmp_path: Path, model):
    with model.writer(tmp_path / "out") as first:
        for resume in (True, False):
            with pytest.raises(OutputError, match="out is being written by another process"):
                model.writer(tmp_path / "out", resume=resume)
        first.write("a", 0, model.tensors["a"])
    model.write(tmp_path / "out")  # the lock went with the first writer


def test_a_second_writer_of_a_shard_is_refused(tmp_path: Path, model):
    staging = Staging(tmp_path / "out")
    staging.join("k")
    options = {"metadata": {}, "key": "k"}
    with (
        ShardWriter(staging, model.layouts[0], **options),
        pytest.raises(OutputError, match=r"00001-of-00003.safetensors is being written by another"),
    ):
        ShardWriter(staging, model.layouts[0], **options)


@pytest.mark.parametrize("missing", ["a", "b", "c", "e"])
def test_an_incomplete_tensor_is_our_error(tmp_path: Path, model, missing: str):
    with (
        pytest.raises(MergewellError, match=f"tensor '{missing}' is incomplete") as error,
        model.writer(tmp_path / "out") as writer,
    ):
        for name, tensor in model.tensors.items():
            flat = tensor.reshape(-1)
            writer.write(name, 0, flat[:-1] if name == missing else flat)
        writer.commit(model.manifest)
    assert not isinstance(error.value, OutputError)
    assert not (tmp_path / "out").exists()


def test_blocks_that_do_not_fit_are_our_error(tmp_path: Path, model):
    with model.writer(tmp_path / "out") as writer:
        for start, tensor in ((1, model.tensors["a"]), (-1, torch.zeros(1)), (0, torch.zeros(11))):
            with pytest.raises(MergewellError, match="do not fit"):
                writer.write("a", start, tensor)
        with pytest.raises(MergewellError, match=r"a: 10 elements of torch.float64 from 0 do not"):
            writer.write("a", 0, model.tensors["a"].double())
        writer.write("a", 0, model.tensors["a"])
        with pytest.raises(MergewellError, match="written twice"):
            writer.write("a", 0, model.tensors["a"])
    assert not list(tmp_path.iterdir())


def test_a_finished_shard_cannot_be_written(tmp_path: Path, model):
    with model.writer(tmp_path / "out") as writer:
        writer.finish(model.layouts[2].file)
        with pytest.raises(MergewellError, match="is finished already"):
            writer.write("d", 0, model.tensors["d"])


@pytest.mark.parametrize("name", ["manifest.json", "../x", "a/b", "", "twice"])
def test_names_that_are_taken_or_outside_are_refused(tmp_path: Path, model, name: str):
    with model.writer(tmp_path / "out") as writer:
        writer.add_file("twice", b"")
        with pytest.raises(MergewellError, match="cannot be added"):
            writer.add_file(name, b"")


def test_a_tensor_planned_twice_is_refused(tmp_path: Path):
    spec = TensorSpec("w", torch.float32, (2,))
    layouts = (ShardLayout("1.safetensors", (spec,)), ShardLayout("2.safetensors", (spec,)))
    with pytest.raises(MergewellError, match="planned twice"):
        CheckpointWriter(tmp_path / "out", layouts, metadata={}, key="")
    with pytest.raises(MergewellError, match="planned twice"):
        CheckpointWriter(tmp_path / "out", one_file(spec, spec), metadata={}, key="")
    assert not list(tmp_path.iterdir())


# Resuming


def test_finished_shards_are_kept_and_the_bytes_are_the_same(tmp_path: Path, model, expected):
    with pytest.raises(KeyboardInterrupt), model.writer(tmp_path / "out") as writer:
        writer.write("e", 0, model.tensors["e"])
        writer.write("c", 0, model.tensors["c"])
        writer.finish(model.layouts[1].file)
        writer.write("a", 0, torch.full((10,), 9.0))  # of a shard that is not finished
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()
    pending = model.write(tmp_path / "out", resume=True)
    assert pending == [model.layouts[0].file, model.layouts[2].file]
    assert contents(tmp_path / "out") == expected
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def interrupted(tmp_path: Path, model) -> Path:
    """Finish one shard, stop, and return the hidden folder."""
    with model.writer(tmp_path / "out") as writer:
        writer.finish(model.layouts[2].file)
    return tmp_path / ".out.mergewell"


def test_a_run_of_another_recipe_is_not_resumed(tmp_path: Path, model):
    hidden = interrupted(tmp_path, model)
    with pytest.raises(OutputError, match=r"mergewell holds an unfinished run of another recipe"):
        model.writer(tmp_path / "out", resume=True, key="other")
    assert (hidden / "files" / model.layouts[2].file).exists()
    with model.writer(tmp_path / "out", key="other") as writer:
        assert len(writer.pending) == 3


def test_without_resume_the_remains_are_removed(tmp_path: Path, model, expected):
    interrupted(tmp_path, model)
    assert len(model.write(tmp_path / "out")) == 3
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, record: file.unlink(),
        lambda file, record: os.truncate(file, 3),
        lambda file, record: record.unlink(),
        lambda file, record: record.write_text(""),
        lambda file, record: record.write_text("{}"),
        lambda file, record: record.write_text(record.read_text().replace('"k"', '"x"')),
    ],
)
def test_a_record_that_does_not_fit_its_shard_is_not_believed(
    tmp_path: Path, model, damage, expected
):
    hidden, name = interrupted(tmp_path, model), model.layouts[2].file
    damage(hidden / "files" / name, hidden / "done" / f"{name}.json")
    assert len(model.write(tmp_path / "out", resume=True)) == 3
    assert contents(tmp_path / "out") == expected


def test_a_shard_that_is_begun_anew_is_no_longer_done(tmp_path: Path, model):
    interrupted(tmp_path, model)
    staging = Staging(tmp_path / "out")
    ShardWriter(staging, model.layouts[2], metadata={"mergewell": "toy"}, key="k").close()
    with model.writer(tmp_path / "out", resume=True) as writer:
        assert len(writer.pending) == 3


def test_remains_of_other_files_do_not_come_along(tmp_path: Path, model, expected):
    files = interrupted(tmp_path, model) / "files"
    (files / model.layouts[0].file).write_bytes(b"x" * 10_000)
    (files / "stray").write_bytes(b"x")
    model.write(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == expected


def test_nothing_is_left_when_nothing_was_finished(tmp_path: Path, model):
    with pytest.raises(ZeroDivisionError), model.writer(tmp_path / "out") as writer:
        writer.write("a", 0, model.tensors["a"])
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_shards_written_alone_are_committed_by_a_resuming_writer(tmp_path: Path, model, expected):
    staging = Staging(tmp_path / "out")
    for layout in model.layouts:  # each could be a process of its own
        staging.join("k")
        with ShardWriter(staging, layout, metadata={"mergewell": "toy"}, key="k") as shard:
            for spec in layout.specs:
                shard.write(spec.name, 0, model.tensors[spec.name])
            shard.finish()
    assert model.write(tmp_path / "out", resume=True) == []
    assert contents(tmp_path / "out") == expected


# The disk


def test_a_disk_without_room_is_refused_before_the_first_byte(
    tmp_path: Path, model, monkeypatch: pytest.MonkeyPatch
):
    real = os.statvfs(tmp_path)
    fields = list(real)
    fields[4] = 0  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    with pytest.raises(OutputError, match=r"out needs [\d,]+ bytes but its disk has 0 left; free"):
        model.writer(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out needs"):
        model.writer(tmp_path / "out", resume=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [0, 1, 100, 900, 1300])
def test_a_disk_that_fills_up_leaves_nothing_under_the_name(
    tmp_path: Path, model, room: int, monkeypatch: pytest.MonkeyPatch, expected
):
    real, left = os.pwrite, [room]

    def pwrite(descriptor: int, content: memoryview, offset: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(descriptor, content[: left[0]], offset)
        left[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match=r"No space left on device\); free space and run again"):
        model.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    left[0] = 10**9
    model.write(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == expected


def test_a_disk_that_cannot_reserve_is_refused(
    tmp_path: Path, model, monkeypatch: pytest.MonkeyPatch
):
    def fail(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OutputError, match=r"No space left on device\); free space"):
        model.write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_cannot_reserve_is_used_all_the_same(
    tmp_path: Path, model, monkeypatch: pytest.MonkeyPatch, expected
):
    def fail(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    model.write(tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_short_writes_are_continued(
    tmp_path: Path, model, monkeypatch: pytest.MonkeyPatch, expected
):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, content, offset: real(fd, content[:3], offset))
    model.write(tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_a_failed_fsync_is_not_asked_again(tmp_path: Path, model, monkeypatch: pytest.MonkeyPatch):
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with model.writer(tmp_path / "out") as writer:
        for name in ("a", "b"):
            writer.write(name, 0, model.tensors[name])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OutputError, match=r"Input/output error\); check the disk"):
                writer.finish(model.layouts[0].file)
        with pytest.raises(MergewellError, match="was closed; begin it anew"):
            writer.finish(model.layouts[0].file)
