"""What is measured of groups, on linear models whose averages are known; and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mergewell.cli.main import main
from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError, PlanError
from mergewell.partners.measure import (
    correlation,
    covariance,
    groups_to_measure,
    measure,
    pairs_of,
    points_of,
)
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe

# each expert tells the sign of one input; the third tells the opposite of the first
WEIGHTS = ([[1.0, 0], [-1, 0]], [[0, 1.0], [0, -1]], [[-3.0, 0], [3, 0]])
INPUTS = ([[1.0, 0], [-1, 0]], [[0, 1.0], [0, -1]], [[1.0, 0], [-1, 0]])


def net() -> nn.Module:
    return nn.Linear(2, 2, bias=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "base.safetensors")
    for place, weight in enumerate(WEIGHTS):
        save_file({"weight": torch.tensor(weight)}, tmp_path / f"{place}.safetensors")
    paths = [{"path": str(tmp_path / f"{place}.safetensors")} for place in range(3)]
    return make_recipe({"base": str(tmp_path / "base.safetensors"), "experts": paths})


def test_kinship_of_known_vectors(recipe: Recipe) -> None:
    found = correlation(covariance(make_plan(recipe)))
    assert np.allclose(found, [[1, 0, -1], [0, 1, 0], [-1, 0, 1]])
    data = recipe.as_data()
    data["experts"].append({"path": data["base"]})
    with pytest.raises(PlanError, match="does not differ from the base"):
        covariance(make_plan(make_recipe(data)))


def test_groups_keep_what_they_should(recipe: Recipe) -> None:
    tasks = [LearningTask(place, [torch.tensor(rows)]) for place, rows in enumerate(INPUTS)]
    groups = groups_to_measure(3)
    assert groups == [(0, 1), (0, 2), (1, 2), (0, 1, 2)]
    kept = measure(recipe, groups, tasks, net)
    # the third, three times as long, shouts the first down
    assert [each.share for each in kept] == [1.0, 0.5, 1.0, pytest.approx(2 / 3)]
    assert pairs_of(kept, 3)[2, 0] == 0.5
    assert [(k, y) for k, y, _ in points_of(kept)] == [
        (2, pytest.approx(2.5 / 3)),
        (3, pytest.approx(2 / 3)),
    ]
    with pytest.raises(DataError, match="each expert's task"):
        measure(recipe, groups, tasks[:2], net)


def test_the_middle_size_is_drawn_by_the_seed() -> None:
    found = groups_to_measure(6)
    assert {len(group) for group in found} == {2, 3, 6}
    assert found == groups_to_measure(6) != groups_to_measure(6, seed=1)


def test_the_command(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "nets_to_pair.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Linear(2, 2, bias=False)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["partners", "--base", str(recipe.base)]
    for place in range(3):
        flags += ["--expert", recipe.experts[place].path]
    assert main(flags) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("kinship  -1.00")
    for place, rows in enumerate(INPUTS):
        np.savez(tmp_path / f"{place}.npz", x=np.array(rows, np.float32))
        flags += ["--data", str(tmp_path / f"{place}.npz")]
    flags += ["--model-factory", "nets_to_pair:net", "--samples", "2"]
    assert main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [group["members"] for group in found["groups"]] == [[0, 1], [0, 1, 2]]
    assert found["groups"][0]["quality"] == 1.0 and found["scaling"] is None
    assert main(flags) == 0
    assert "100 % of answers kept (measured)" in capsys.readouterr().out
