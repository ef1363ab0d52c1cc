"""`calibrate` and `join` from the command line, on a toy network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import cnn, images, randomised
from safetensors.torch import save_file

from mergewell.calibration.file import read_calibration
from mergewell.cli.main import main


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Write a base, two experts and data; return the flags that name them."""
    start = randomised(cnn(), 0, 0.1)
    flags: list[str] = []
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        state = {
            n: t + 0.02 * seed * torch.rand(t.shape) if t.is_floating_point() else t
            for n, t in start.items()
        }
        save_file(state, tmp_path / f"{name}.safetensors")
        flags += ["--expert" if seed else "--base", str(tmp_path / f"{name}.safetensors")]
    inputs = np.random.default_rng(0).normal(size=(40, 3, 16, 16)).astype("float32")
    np.savez(tmp_path / "data.npz", x=inputs)
    return [*flags, "--model-factory", "architectures:cnn"]


def test_shards_joined_and_checked(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(tmp_path / "data.npz")]
    files = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for index, file in enumerate(files):
        done = ["--out", file, "--shard", f"{index}/2"]
        assert main(["calibrate", *given, *data, *done]) == 0
    out = capsys.readouterr().out
    first, second = out.splitlines()
    assert "24 of 40 samples" in first and "1 of 3 batches are still to be run" in first
    assert "16 of 40 samples" in second and "2 of 3 batches" in second
    joined = str(tmp_path / "joined.safetensors")
    assert main(["join", *files, "--out", joined, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["samples"] == summary["samples_in_all"] == 40
    assert summary["batches"] == [0, 1, 2] and summary["blocks"][0] == "blocks.0"
    without_factory = given[:-2]
    assert main(["check", *without_factory, "--calibration", joined, "--json", "-"]) == 0
    from_file = json.loads(capsys.readouterr().out)
    assert main(["check", *given, *data, "--json", "-"]) == 0
    direct = json.loads(capsys.readouterr().out)
    assert from_file["samples"] == direct["samples"] == 40
    for one, other in zip(from_file["layers"], direct["layers"], strict=True):
        assert one["relative"] == pytest.approx(other["relative"], rel=1e-9)
    assert from_file["predictors"].keys() == direct["predictors"].keys()


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert sentence in message and message.count("\n") == 1, message


def test_what_is_wrong_is_one_sentence(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = ["--data", str(tmp_path / "data.npz")], ["--out", str(tmp_path / "c.safetensors")]
    refused(capsys, ["calibrate", *given, *data], "add --out FILE")
    refused(capsys, ["calibrate", *given, *out], "add --data PATH")
    refused(capsys, ["calibrate", *given, *data, *out, "--shard", "3/3"], "i from 0 to N - 1")
    refused(capsys, ["calibrate", *given, *data, *out, "--mode", "owm"], "did you mean 'own'")
    refused(capsys, ["calibrate", *given, *data, "--out", str(tmp_path / "no/c")], "is no folder")
    refused(capsys, ["calibrate", *given, *data, "--out", given[1]], "exists already")
    refused(capsys, ["join", str(tmp_path / "x.safetensors"), *out], "x.safetensors")
    assert main(["calibrate", *given, *data, *out]) == 0
    another = [*given[:-2], "--method", "ties", "--calibration", out[1]]
    refused(capsys, ["check", *another], "another method, other settings or coefficients")
    swapped = [*given[:2], given[2], given[5], given[4], given[3], "--calibration", out[1]]
    refused(capsys, ["check", *swapped], "is not the expert 1 that the calibration was made with")
    one = [*given[:4], "--calibration", out[1]]
    refused(capsys, ["check", *one], "of 2 experts and 1 are named")
    refused(capsys, ["check", *given, *data, "--calibration", out[1]], "exclude each other")


def test_data_of_each_expert_s_task_and_what_methods_want_of_them(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        torch.manual_seed(number)
        save_file({"x": images(20)}, tmp_path / f"task{number}.safetensors")
    data = [flag for n in (0, 1) for flag in ("--data", str(tmp_path / f"task{n}.safetensors"))]
    limit = ["--samples", "27"]
    both, forward = str(tmp_path / "both.safetensors"), str(tmp_path / "forward.safetensors")
    more = ["--gram", "--fisher", "classes"]
    assert main(["calibrate", *given, *data, *limit, *more, "--out", both]) == 0
    head = read_calibration(both).head
    # 14 and 13 samples, at most 16 a batch
    assert (head.samples, head.batches, head.owners) == (27, 2, (0, 1))
    assert head.fisher == "classes" and head.grams["head"] == 1 and not head.forward
    one = read_calibration(both).value("gram", "head/expert 2")
    assert float(one["count"]) == 13
    plus = ["--method", "regmean_plus_plus", "--set", "alpha=0.5"]
    assert main(["calibrate", *given, *data, *limit, *plus, "--out", forward]) == 0
    head = read_calibration(forward).head
    assert head.forward.startswith("regmean_plus_plus") and '"alpha": 0.5' in head.forward
    flags = given[:-2]
    base, experts = flags[1], [flags[i + 1] for i, f in enumerate(flags) if f == "--expert"]
    for method, file in [("regmean", both), ("fisher", both), ("regmean_plus_plus", forward)]:
        recipe = tmp_path / f"{method}.yaml"
        listed = ", ".join(f"{{path: {path}}}" for path in experts)
        recipe.write_text(
            f"base: {base}\nexperts: [{listed}]\nmethod: {{name: {method}}}\ncalibration: {file}\n"
        )
        assert main(["merge", str(recipe), "--out", str(tmp_path / method)]) == 0
    capsys.readouterr()
    shard = ["--shard", "0/2", "--out", str(tmp_path / "no")]
    refused(capsys, ["calibrate", *given, *data, *plus, *shard], "calibrated in one go")
    three = [*data, *data[:2], "--out", str(tmp_path / "no")]
    refused(capsys, ["calibrate", *given, *three], "3 paths of data are named for 2 experts")
    few = [*data, "--samples", "1", "--out", str(tmp_path / "no")]
    refused(capsys, ["calibrate", *given, *few], "1 samples are too few for 2 experts")
    kind = [*data, "--fisher", "class", "--out", str(tmp_path / "no")]
    refused(capsys, ["calibrate", *given, *kind], "did you mean 'classes'")
