"""The atlas on a toy: experts of a two-layer network, trained, broken, merged and tabulated.

The harness stands outside the package: its folder is put on the path, as Python does for scripts.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "benchmarks" / "atlas"
NAMES = (
    "book", "family", "experts", "merges", "seen", "predictors", "pulls", "measure", "table", "run",
)  # fmt: skip


@pytest.fixture(scope="module")
def atlas() -> Iterator[Mapping[str, Any]]:
    """The harness's modules, by name."""
    outside = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            del sys.modules[name]
        sys.modules.update(outside)


def toy(atlas: Mapping[str, Any], folder: Path) -> Any:
    """Return a family of three tasks: points on a plane, turned differently in each."""
    family = atlas["family"]

    class Toy(family.Family):
        name = "toy"
        tasks = ("left", "right", "middle")
        bases = ("one", "two")

        def factory(self) -> nn.Module:
            return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4)).eval()

        def base_path(self, base: str) -> Path:
            return self.folder / f"{base}.safetensors"

        def prepare(self) -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for seed, base in enumerate(self.bases):
                torch.manual_seed(seed)
                if not self.base_path(base).exists():
                    save_file(self.factory().state_dict(), self.base_path(base))

        def head(self, base: str, task: str) -> Tensor:
            return torch.eye(4)[:2]

        def logits(self, output: Tensor, head: Tensor) -> Tensor:
            return 5 * output @ head.T

        def test(self, task: str) -> Any:
            return self._part(task, 64)

        def inputs(self, task: str) -> Any:
            return self._part(task, 16)

        def _part(self, task: str, count: int) -> Any:
            angle = float(self.tasks.index(task))
            x = torch.randn(count, 2, generator=torch.Generator().manual_seed(count))
            y = (x @ torch.tensor([math.cos(angle), math.sin(angle)]) > 0).long()
            return family.Part([x], [y])

        def draw(self, base: str, number: int) -> Any:
            task = self.tasks[number % 3]
            return family.Run(
                family=self.name, base=base, task=task, number=number, stops=(5, 20), seed=number
            )

        def train(self, run: Any, keep: Callable[[int, Any], None]) -> None:
            module = self.factory()
            module.load_state_dict(family.read_state(self.base_path(run.base)))
            part = self.test(run.task)
            optimiser = torch.optim.Adam(module.parameters(), lr=0.03)
            for step in range(1, 21):
                optimiser.zero_grad()
                logits = self.logits(module(part.batches[0]), self.head(run.base, run.task))
                nn.functional.cross_entropy(logits, part.labels[0]).backward()
                optimiser.step()
                if step in run.stops:
                    keep(step, {n: t.clone() for n, t in module.state_dict().items()})

        def write(self, path: Path, base: str, state: Any, note: Mapping[str, str]) -> None:
            save_file(state, path, dict(note))

        def hidden(self, state: Any) -> Any:
            return [[("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]]

        def draws(self) -> Any:
            return family.Drawing(runs=6, first=12, sizes=(2, 3))

    return Toy(folder, folder)


@pytest.fixture(scope="module")
def measured(atlas: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The toy's experts, and the rows of its first sets."""
    folder = tmp_path_factory.mktemp("atlas")
    family = toy(atlas, folder)
    table, book = atlas["table"], atlas["book"].Book
    experts = atlas["experts"].Experts(family, book(family.folder / "experts.jsonl", table.EXPERT))
    experts.make(math.inf)
    rows = book(family.folder / "merges.jsonl", table.MERGE)
    it = atlas["measure"].Atlas(family, experts, rows)
    found = [row for number in range(1) for row in it.measure("one", number, math.inf)]
    return family, experts, it, found


def test_experts_are_trained_and_broken_and_a_permuted_one_computes_the_same(
    atlas: Mapping[str, Any], measured: Any
) -> None:
    family, experts, *_ = measured
    rows = experts.rows
    assert len(rows) == 2 * (6 * 2 + 2)  # bases, runs, checkpoints; every fifth run a broken one
    kinds = {row["expert"]: row["kind"] for row in rows.values()}
    assert kinds["one.x00"] == "permuted" and kinds["one.x01"] == "flipped"
    permuted, parent = experts.state("one.x00"), experts.state(experts.all["one.x00"].parent)
    assert not torch.equal(permuted["0.weight"], parent["0.weight"])
    runner, part = atlas["family"].Runner(family), family.test("left")
    runner.put(parent)
    before = runner.features(part)
    runner.put(permuted)
    assert torch.allclose(runner.features(part), before, atol=1e-6)
    assert rows["one.000.20"]["accuracy"] > rows["one.000.20"]["base_accuracy"]


def test_a_merge_is_measured_with_predictors_of_all_budgets(measured: Any) -> None:
    _, _, _, rows = measured
    assert not [row for row in rows if "error" in row and row["method"] != "slerp"]
    row = rows[0]
    assert row["method"] == "average" and row["coefficients"] == [1.0] * len(row["experts"])
    for name in ("w_mean_cosine", "u_m_loss_median", "u_m_loss_own_median", "u_output_gap",
                 "u_kl_own_mean", "w_kept_min", "l_own_gradient_l2_mean"):  # fmt: skip
        assert math.isfinite(row["predictors"][name]), name
    assert all(len(values) == len(row["experts"]) for values in row["each"].values())
    # of the average of K experts, what is kept of all task vectors adds up to its own square
    kept, norm = np.array(row["each"]["w_kept"]), np.array(row["each"]["w_norm"])
    merged = row["predictors"]["w_merged_norm"]
    assert float((kept * norm**2).mean()) == pytest.approx(merged**2, rel=1e-3)


def test_captured_features_are_those_of_a_calibration(
    atlas: Mapping[str, Any], measured: Any
) -> None:
    from mergewell.calibration.collect import calibrate
    from mergewell.calibration.data import Data
    from mergewell.plan import make_plan

    family, experts, it, rows = measured
    of = atlas["merges"].draw_set(family, experts, "one", 0)
    plain = atlas["measure"].AVERAGE(len(of.experts))
    plan = make_plan(atlas["merges"].recipe(family, experts, of, plain))
    tasks = list(dict.fromkeys(expert.task for expert in of.experts))
    batches = [batch for task in tasks for batch in family.inputs(task).batches]
    found = calibrate(plan, Data(family.factory, batches, 16 * len(batches)))
    assert found.outputs is not None
    for place, expert in enumerate(of.experts):
        own = [part for t in tasks for part in it.eye.inputs(expert.name, t, dict).outputs]
        assert torch.allclose(torch.cat(own), found.outputs[1 + place], atol=1e-6)
    losses = [layer.relative for layer in found.m_loss]
    assert rows[0]["predictors"]["u_m_loss_worst"] == pytest.approx(max(losses), rel=1e-3)


def test_rows_are_made_once_and_stand_in_tables(
    atlas: Mapping[str, Any], measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _, it, rows = measured
    assert not list(it.measure("one", 0, math.inf))  # all of it is known
    table = atlas["table"]
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    table.tabulate(family.folder.parent, "toy")
    merges = table.known("merges", "toy")
    assert len(merges) == len(rows)
    one = merges[0]
    raw = next(r for r in rows if all(r[key] == one[key] for key in table.MERGE))
    kept = np.array(raw["merged"]) / np.array(raw["own"])
    assert one["retention"] == pytest.approx(kept.mean(), rel=1e-4)
    assert len(table.known("tasks", "toy")) == sum(len(r["experts"]) for r in rows if "own" in r)
    before = (tmp_path / "merges.toy.csv.gz").read_bytes()
    (family.folder / "merges.jsonl").unlink()  # another machine: only the table is there
    table.tabulate(family.folder.parent, "toy")
    assert (tmp_path / "merges.toy.csv.gz").read_bytes() == before


def test_rank_correlation_shares_ranks_of_ties(atlas: Mapping[str, Any]) -> None:
    # ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: covariance 4.5 of variances 4.5 and 5
    found = atlas["table"].spearman(np.array([0.0, 1, 1, 2]), np.array([1.0, 3, 2, 4]))
    assert found == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
