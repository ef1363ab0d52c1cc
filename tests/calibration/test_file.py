"""Calibrations in files: what goes in comes out, and damage is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, cnn, llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergewell.calibration.file import join_calibrations, read_calibration, write_calibration
from mergewell.calibration.plain import plain, unplain
from mergewell.calibration.result import Calibration, Head, Model
from mergewell.errors import CheckpointError, DataError, OutputError
from mergewell.models.trace import trace
from mergewell.statistics.activation_drift import ActivationDrift, Sides


def calibration(batch: int) -> Calibration:
    outputs = [torch.full((2, 3), float(value)) for value in (1, 2, 4, 3)]
    state = ActivationDrift().update({}, Sides(outputs, [0.5, 0.5]))
    models = tuple(Model(name, "/x", f"h{name}") for name in ("base", "expert 1", "merged"))
    head = Head("xxh3-128:1", 4, 2, "merged", (1.0,), models, (), (), {"a": "why"})
    return Calibration(head, frozenset({batch}), 2, {"output/": state})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    write_calibration(path, calibration(0))
    found = read_calibration(path)
    assert found.head == calibration(0).head and (found.done, found.seen) == ({0}, 2)
    assert found.output_gap == calibration(0).output_gap == 0
    assert set(load_file(path)) == {f"output//{k}" for k in ("change", "base", "gap", "ensemble")}
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["mergewell.calibration"])
    assert about["version"] == 1 and about["models"][0]["digest"] == "hbase"
    with pytest.raises(OutputError, match="exists already"):
        write_calibration(path, calibration(1))


def test_files_are_joined(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for batch, path in enumerate(paths):
        write_calibration(path, calibration(batch))
    found = join_calibrations(paths)
    assert (found.done, found.seen) == ({0, 1}, 4)
    assert float(found.states["output/"]["base"]) == 12
    with pytest.raises(DataError, match=r"a\.safetensors and .*a\.safetensors both hold batch 0"):
        join_calibrations([paths[0], paths[0]])
    with pytest.raises(DataError, match="No calibration is named"):
        join_calibrations([])


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_calibration(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(DataError, match="is no calibration"):
        read_calibration(path)
    for about, message in [
        ("{", "header cannot be read"),
        ("[]", "header cannot be read"),
        ('{"version": 2}', "of version 2"),
        ('{"version": 1, "data": ""}', "header cannot be read"),
    ]:
        save_file({"a": torch.ones(1)}, path, {"mergewell.calibration": about})
        with pytest.raises((CheckpointError, DataError), match=message):
            read_calibration(path)


def test_a_state_that_is_missing_is_named(tmp_path: Path) -> None:
    whole = calibration(0)
    path = tmp_path / "c.safetensors"
    write_calibration(path, replace(whole, head=replace(whole.head, blocks=("layer.0",))))
    with pytest.raises(CheckpointError, match=r"drift/layer\.0 is missing"):
        read_calibration(path)
    with pytest.raises(DataError, match=r"holds no gram of x"):
        whole.value("gram", "x")


@pytest.mark.parametrize("factory", [llama, cnn])
def test_units_come_back_as_they_were(factory) -> None:
    name = factory.__name__
    net = factory()
    units = trace(net, ARCHITECTURES[name][1](2)).units
    data = json.loads(json.dumps([plain(unit) for unit in units]))
    back = [unplain(part) for part in data]
    z = torch.linspace(-3, 3, 7)
    assert len(back) > 3
    for unit, other in zip(units, back, strict=True):
        assert (unit.name, unit.kind, unit.nodes, unit.parameters) == (
            other.name, other.kind, other.nodes, other.parameters,
        )  # fmt: skip
        for branch, its in zip(unit.branches, other.branches, strict=True):
            assert branch.rows == its.rows and branch.batch_norm == its.batch_norm
            assert torch.equal(branch.activation(z), its.activation(z))


def test_operations_of_others_are_not_called() -> None:
    step = {"is": "Step", "operation": "evil.run.default", "args": [], "kwargs": {}}
    with pytest.raises(ValueError, match="no operation of torch's own"):
        unplain(step)
