import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergewell.errors import DataError, OutputError
from mergewell.report.results import (
    Check,
    Cutoffs,
    Results,
    read_check,
    read_results,
    validated,
    write_results,
)

Data = dict[str, Any]


def test_results_come_back_as_they_were(example: Data, tmp_path: Path) -> None:
    results = validated(Results, example, where="example")
    path = write_results(tmp_path / "new", results)
    assert read_results(tmp_path / "new") == results
    assert json.loads(path.read_text(encoding="utf-8"))["accuracy"] == example["accuracy"]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_the_contract_names_stand_in_the_file(example: Data, tmp_path: Path) -> None:
    data = json.loads(
        write_results(tmp_path, validated(Results, example, where="example")).read_text()
    )
    contract = ["version", "tasks", "accuracy", "intervals", "m_loss", "seconds", "report"]
    assert set(contract) <= set(data)
    assert set(data["accuracy"]) == {"base", "expert", "ensemble", "merged"}
    row = {"layer", "activation", "nodes", "absolute", "relative", "node"}
    assert set(data["m_loss"][0]) >= row
    check = "version base experts samples mode layers predictors prediction verdict uncovered"
    assert set(check.split()) <= set(data["check"])
    assert data["check"]["prediction"] is None


def test_unknown_fields_are_kept(example: Data, tmp_path: Path) -> None:
    example["added"] = {"later": [1, 2]}
    write_results(tmp_path, validated(Results, example, where="example"))
    assert json.loads((tmp_path / "results.json").read_text())["added"] == {"later": [1, 2]}


def test_a_check_is_read_by_itself(example: Data, tmp_path: Path) -> None:
    (tmp_path / "check.json").write_text(json.dumps(example["check"]), encoding="utf-8")
    check = read_check(tmp_path / "check.json")
    results = Results.of_check(check)
    assert results.layers == check.layers
    assert results.cosine_matrix == tuple(tuple(row) for row in example["cosines"])
    assert results.relative_norms == example["norms"]
    assert results.conflict == example["sign_conflict"]


def change(*path: str | int, value: Any) -> Callable[[Data], None]:
    def apply(data: Data) -> None:
        place: Any = data
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value

    return apply


def drop(*path: str) -> Callable[[Data], None]:
    def apply(data: Data) -> None:
        place = data
        for part in path[:-1]:
            place = place[part]
        del place[path[-1]]

    return apply


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (change("version", value=2), "is of version 2"),
        (change("accuracy", "base", "mnist", value=1.2), "accuracy.base.mnist = 1.2"),
        (change("m_loss", 3, "relative", value=float("nan")), "NaN or infinite"),
        (change("m_loss", 3, "node", 0, value=float("inf")), "m_loss.3.node.0"),
        (change("m_loss", 3, "nodes", value=5), "has 5 nodes but"),
        (change("cosines", value=[[1.0, 0.0]]), "not a square matrix"),
        (change("cosines", value=[[1.0]]), "1 x 1 for 4 experts"),
        (change("intervals", "merged", "ties", "mnist", value=[0.9, 0.8]), "low end is above"),
        (change("accuracy", "merged", "ties", "moon", value=0.5), "names 'moon'"),
        (change("tasks", value=["mnist", "mean"]), "'mean' is taken"),
        (change("report", value="../../index.html"), "plain file name"),
        (change("ensemble_kind", value="votes"), "ensemble_kind"),
        (change("check", "findings", 0, "level", value="superb"), "check.findings.0.level"),
        (drop("accuracy", "expert", "mnist"), "accuracy.expert lacks 'mnist'"),
        (drop("check", "verdict"), "lacks 'check.verdict'"),
    ],
)
def test_a_broken_contract_is_one_clear_sentence(
    example: Data, spoil: Callable[[Data], None], said: str
) -> None:
    spoil(example)
    with pytest.raises(DataError) as caught:
        validated(Results, example, where="here/results.json")
    message = str(caught.value)
    assert said in message
    assert message.startswith("here/results.json")
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b'{"version": 1,', "is not JSON at line 1, column"),
        (b"[1, 2]", "holds no JSON object"),
        (b'{"version": 1, "sign_conflict": NaN}', "holds NaN, which is not JSON"),
        (b'{"title": "\xff"}', "is not UTF-8 text at byte 11"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_results(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path / "results.json") in str(caught.value)


def test_infinity_in_an_added_field_is_never_written(example: Data, tmp_path: Path) -> None:
    example["added"] = [float("inf")]
    results = validated(Results, example, where="example")
    with pytest.raises(DataError, match="NaN or infinity"):
        write_results(tmp_path, results)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(example: Data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        write_results(tmp_path / "file", validated(Results, example, where="example"))


def test_levels_are_those_of_the_diagnostic() -> None:
    from mergewell.diagnostics.m_loss import layer_level

    for relative in (0.0, 0.049, 0.05, 0.0501, 0.199, 0.2, 0.2001, 3.0):
        assert Cutoffs().level(relative) == layer_level(relative)


def test_a_check_needs_no_optional_field() -> None:
    check = validated(Check, {"base": "b", "experts": ["e"], "verdict": "Yes."}, where="check")
    assert Results.of_check(check).layers == ()


def test_node_values_are_written_once(example: Data, tmp_path: Path) -> None:
    results = validated(Results, example, where="example")
    written = json.loads(write_results(tmp_path, results).read_text())
    assert [row["node"] for row in written["m_loss"]] == [
        row.get("node", []) for row in example["m_loss"]
    ]
    assert all(row["node"] == [] for row in written["check"]["layers"])
    assert read_results(tmp_path).check == results.check
    # rows of its own are the check's own to keep
    example["check"]["layers"] = example["m_loss"][:2]
    results = validated(Results, example, where="example")
    written = json.loads(write_results(tmp_path, results).read_text())
    assert written["check"]["layers"][0]["node"] == example["m_loss"][0]["node"]
    assert read_results(tmp_path) == results


def test_kinds_are_those_of_the_units() -> None:
    from typing import get_args

    from mergewell.models import units
    from mergewell.report import results

    assert get_args(results.Kind) == get_args(units.Kind)


def test_wholes_stand_apart_from_units(example: Data) -> None:
    results = validated(Results, example, where="example")
    assert [layer.kind for layer in results.wholes] == ["block", "block", "output"]
    assert len(results.units) == 34
    assert {layer.kind for layer in results.units} == {"activation", "attention"}
