import json
from pathlib import Path

import pytest
from toys import family

from mergewell.cli.main import main
from mergewell.storage.checkpoint import open_checkpoint


def test_extract_prints_the_error_of_each_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, (expert,) = family(tmp_path, 1)
    given = ["extract", str(expert), "--base", str(base), "--leave-out", "scale"]
    out = tmp_path / "adapter"
    assert main([*given, "--rank", "8", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "embed.weight    rank    8  error 9" in shown
    assert "layer.0.bias    kept whole" in shown and "scale           left at the base's" in shown
    assert main([*given, "--energy", "0.5", "--out", str(tmp_path / "b"), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["version"] == 1 and done["energy"] == 0.5
    assert all(cut["error"] <= 0.5**0.5 for cut in done["tensors"].values())
    assert 0.5 < done["error"] < 0.5**0.5
    read = open_checkpoint(out, base=open_checkpoint(base))
    assert set(read) == set(open_checkpoint(base))


def test_what_is_not_named_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, (expert,) = family(tmp_path, 1)
    given = ["extract", str(expert), "--base", str(base)]
    for arguments, sentence in (
        (given, "No output folder is named"),
        ([*given, "--out", "x"], "No size is named; add --rank 16"),
        ([*given, "--out", "x", "--rank", "2", "--dtype", "float8"], "--dtype float8: did you"),
        (["extract", str(expert), "--out", "x", "--rank", "2"], "name it with --base PATH"),
    ):
        assert main(arguments) == 2
        assert sentence in capsys.readouterr().err
