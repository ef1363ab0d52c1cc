"""The quality benchmark on a toy: two experts of one linear layer.

The harness stands outside the package: its folder is put on the path, as Python does for scripts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"


@pytest.fixture(scope="module")
def quality() -> Iterator[Mapping[str, Any]]:
    """The harness's modules, by name."""
    import importlib

    names = (
        "spaces", "benchmark", "book", "judged", "merging", "run", "summary", "verdict", "page",
    )  # fmt: skip
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in set(sys.modules) - before:
            if name in (*names, "picture"):
                del sys.modules[name]


TASKS = ("left", "right")


@pytest.fixture
def toy(quality: Mapping[str, Any], tmp_path: Path) -> Any:
    """Two tasks, each with an expert that moves one row of the base."""
    base = {"weight": torch.eye(3, 4), "bias": torch.zeros(3)}
    paths = {"base": tmp_path / "base.safetensors"}
    save_file(base, paths["base"])
    for number, task in enumerate(TASKS):
        paths[task] = tmp_path / f"{task}.safetensors"
        moved = base["weight"].clone()
        moved[number] += torch.tensor([0.0, 0.0, 0.0, 2.0])
        save_file({**base, "weight": moved}, paths[task])
    part = quality["benchmark"].Part
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))

    def parts(start: int, stop: int) -> dict[str, Any]:
        labels = torch.arange(start, stop) % 3
        return {task: part(x[start:stop].split(5), labels.split(5)) for task in TASKS}

    return quality["benchmark"].Benchmark(
        name="vision", title="toy", metric="accuracy", seed=0, base=paths["base"],
        experts={task: paths[task] for task in TASKS}, factory=lambda: nn.Linear(4, 3),
        logits=lambda task, output: output, validation=parts(0, 10), test=parts(10, 30),
        inputs=parts(30, 40), precision="float32",
    )  # fmt: skip


@pytest.fixture
def bench(quality: Mapping[str, Any], toy: Any, tmp_path: Path) -> Any:
    book = quality["book"].Book(tmp_path / "results" / "vision.jsonl")
    made = quality["run"].Bench(toy, book, tmp_path / "cache")
    made.prepare()
    return made


def test_every_method_has_as_many_candidates_which_it_takes(quality: Mapping[str, Any]) -> None:
    from mergewell.learners.base import LEARNERS
    from mergewell.methods.base import METHODS

    spaces = quality["spaces"]
    assert set(spaces.SPACES) <= {*METHODS.names(), *LEARNERS.names()}
    for name in (*METHODS.names(), *LEARNERS.names()):
        space, found = spaces.space_of(name), spaces.candidates(name)
        assert len(found) == (1 if space.scales == spaces.AS_IS else spaces.BUDGET), name
        assert found == spaces.candidates(name)
        family = METHODS if name in METHODS.names() else LEARNERS
        for candidate in found:
            family.build(name, candidate.parameters)
        if name not in spaces.OWN:
            assert sorted(c.scale for c in found) == sorted(space.scales)
        for parameter, values in space.choices.items():
            counts = [sum(c.parameters[parameter] == v for c in found) for v in values]
            assert max(counts) - min(counts) <= 1, (name, parameter)


def test_a_space_is_the_method_s_own_search(quality: Mapping[str, Any]) -> None:
    from mergewell.methods.base import METHODS

    spaces = quality["spaces"]
    ties = dict(METHODS.get("ties").search)
    assert spaces.space_of("ties") == spaces.Space(ties["scale"], {"density": ties["density"]})
    # its scale would be 0.3, and the factor on the merged task vector stands for it
    assert spaces.space_of("task_arithmetic").fixed == {"scale": 1.0}
    assert spaces.space_of("regmean").scales == spaces.BROAD
    assert spaces.space_of("wise_ft").choices == {}


def test_a_method_without_a_space_gets_the_default_one(quality: Mapping[str, Any]) -> None:
    found = quality["spaces"].candidates("written_tomorrow")
    assert [dict(c.parameters) for c in found] == [{}] * quality["spaces"].BUDGET
    assert 1.0 in [c.scale for c in found]


def test_validation_and_test_examples_share_none(quality: Mapping[str, Any]) -> None:
    cut = quality["benchmark"].cut
    validation, test = cut(100, 0)
    assert len(validation) == 25
    assert sorted([*validation, *test]) == list(range(100))
    assert list(cut(100, 1)[0]) != list(validation)
    assert len(cut(5000, 0)[0]) == quality["benchmark"].VALIDATION
    assert [len(cut(5000, seed)[1]) for seed in (0, 1)] == [4800, quality["benchmark"].REPORTED]


def test_scale_is_a_factor_on_the_merged_task_vector(quality: Mapping[str, Any], bench) -> None:
    candidate = quality["spaces"].Candidate
    state = bench.merges.merged("task_arithmetic", candidate({"scale": 1.0}, 0.5))
    assert state["weight"][0].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert state["weight"][1].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert state["weight"][2].tolist() == [0.0, 0.0, 1.0, 0.0]


def test_the_own_expert_differs_from_itself_by_nothing(quality: Mapping[str, Any], bench) -> None:
    bench.judge.of.inputs.pop("right")
    bench._load(bench.merges.expert("left"))
    found = bench.judge.without_labels(held_out=False)
    assert found["kl_routed"] == pytest.approx(0.0, abs=1e-7)
    assert found["agreement"] == 1.0
    assert found["kl_uniform"] > 1e-4


def test_inputs_that_made_a_merge_do_not_choose_it(
    quality: Mapping[str, Any], bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [batch for part in bench.of.inputs.values() for batch in part.batches]
    first, owners = bench.merges.inputs(half=True)
    assert [batch.tolist() for batch in first] == [every[0].tolist(), every[2].tolist()]
    assert list(owners) == [0, 1]
    asked: list[tuple[str, bool]] = []
    candidate = quality["spaces"].Candidate({"steps": 1}, 1.0)
    merged = bench.merges.merged
    monkeypatch.setattr(
        bench.merges,
        "merged",
        lambda name, one, half=False: (asked.append((name, half)), merged(name, one, half=half))[1],
    )
    judged = bench.judge.without_labels
    monkeypatch.setattr(
        bench.judge,
        "without_labels",
        lambda held_out: (asked.append(("judged", held_out)), judged(held_out=held_out))[1],
    )
    bench._tried("adamerging", candidate)
    bench._tried("average", quality["spaces"].Candidate({}, 1.0))
    assert asked == [
        ("adamerging", False), ("adamerging", True), ("judged", True),
        ("average", False), ("judged", False),
    ]  # fmt: skip


def test_a_run_writes_its_rows_once(quality: Mapping[str, Any], bench) -> None:
    bench.run("task_arithmetic", retry=False, redo=False)
    lines = bench.book.path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("candidate") == 10
    assert 1 <= kinds.count("test") <= 2
    names = [row["method"] for row in rows if row["kind"] == "reference"]
    assert names == ["base", *TASKS, "ensemble", "experts"]
    assert all(row["commit"] for row in rows if row["kind"] == "candidate")
    again = quality["run"].Bench(
        bench.of, quality["book"].Book(bench.book.path), bench.book.path.parents[1] / "cache"
    )
    again.prepare()
    again.run("task_arithmetic", retry=False, redo=False)
    assert bench.book.path.read_text().splitlines() == lines
    again.run("task_arithmetic", retry=False, redo=True)
    assert len(bench.book.path.read_text().splitlines()) > len(lines) + 9


def test_a_candidate_that_fails_is_a_row_with_its_error(bench) -> None:
    bench.run("arcee_fusion", retry=False, redo=False)
    rows = [row for row in bench.book.rows.values() if row["method"] == "arcee_fusion"]
    assert len(rows) == 10
    assert all("takes 1 experts" in row["error"] for row in rows)


def test_a_learner_is_run_like_a_method(bench) -> None:
    bench.run("greedy_soup", retry=False, redo=False)
    rows = [row for row in bench.book.rows.values() if row["method"] == "greedy_soup"]
    assert [row["kind"] for row in rows] == ["candidate", "test"]


def test_what_a_learner_writes_is_no_part_of_its_row(
    quality: Mapping[str, Any], bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = quality["spaces"].Space((1.0,), fixed={"steps": 1})
    monkeypatch.setitem(quality["spaces"].SPACES, "distillation", space)
    bench.run("distillation", retry=False, redo=False)
    rows = [row for row in bench.book.rows.values() if row["method"] == "distillation"]
    assert [(row["kind"], row["parameters"], row.get("error")) for row in rows] == [
        ("candidate", {"steps": 1}, None), ("test", {"steps": 1}, None),
    ]  # fmt: skip


def test_labels_and_unlabelled_inputs_choose_by_their_own_measure(
    quality: Mapping[str, Any],
) -> None:
    rows = [
        {"score": 0.5, "kl_routed": 0.1},
        {"score": 0.7, "kl_routed": 0.3},
        {"score": 0.7, "kl_routed": 0.2},
    ]
    assert quality["book"].chosen(rows) == (rows[1], rows[0])


def test_judged_by_hand(quality: Mapping[str, Any]) -> None:
    scores = {"left": np.array([1.0, 1, 0, 0]), "right": np.array([1.0, 0])}
    own = {"left": np.array([1.0, 1, 0, 0]), "right": np.array([1.0, 1])}
    row = quality["judged"].judged("accuracy", scores, own, {"own": own})
    assert (row["mean"], row["worst_task"], row["worst"]) == (50.0, "right", 50.0)
    assert row["worst_kept"] == 0.5
    assert row["over"]["own"][0] == -25.0
    assert row["low"] < 50.0 < row["high"]


def test_an_answer_counts_the_interval_and_methods_with_every_seed(
    quality: Mapping[str, Any],
) -> None:
    summary, verdict = quality["summary"], quality["verdict"]

    def method(name: str, gain: tuple[float, float, float], validation: float, seeds: int) -> Any:
        line = summary.Line(
            seeds=tuple(range(seeds)), mean=70.0, low=69.0, high=71.0, spread=(69.0, 71.0),
            worst=50.0, worst_task="left", worst_kept=0.5, over={"task_arithmetic": gain},
            over_seeds={"task_arithmetic": gain[1:]}, settings=("",), validation=validation,
        )  # fmt: skip
        return summary.Method(name, "weights", {"labels": line}, 1.0)

    book = quality["book"].Book(Path("absent"))
    compared = method("task_arithmetic", (0.0, 0.0, 0.0), 0.9, 2)
    lucky = method("lucky", (20.0, 19.0, 21.0), 0.99, 1)  # a seed that may be an easy one
    for gain, answer in (
        ((6.0, 5.5, 6.5), "Yes"),
        ((6.0, 4.5, 7.5), "Yes by the mean, not by the whole interval"),
        ((4.0, 2.5, 5.5), "Not shown"),
        ((4.0, 3.5, 4.5), "No"),
    ):
        best, worse = method("best", gain, 0.8, 2), method("worse", (9.0, 8.0, 9.5), 0.7, 2)
        (found,) = verdict.verdicts(book, [compared, worse, best, lucky])
        assert (found.method, found.answer) == ("best", answer)


def test_perplexity_is_lower_where_the_merge_is_better(quality: Mapping[str, Any]) -> None:
    logs = {"left": np.log([0.5, 0.5]), "right": np.log([0.125, 0.125])}
    own = {"left": np.log([0.5, 0.5]), "right": np.log([0.25, 0.25])}
    row = quality["judged"].judged("perplexity", own, own, {"other": logs})
    assert row["tasks"] == pytest.approx({"left": 2.0, "right": 4.0})
    assert row["mean"] == pytest.approx(8**0.5)
    assert row["over"]["other"][0] == pytest.approx(100 * (1 - 0.5**0.5))
    worse = quality["judged"].judged("perplexity", logs, own, {})
    assert (worse["worst_task"], worse["worst_kept"]) == ("right", pytest.approx(0.5))


def test_the_page_says_what_the_rows_say(
    quality: Mapping[str, Any], bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("task_arithmetic", "ties", "arcee_fusion"):
        bench.run(name, retry=False, redo=False)
    out, results = tmp_path / "docs", bench.book.path.parent
    arguments = ["page.py", "--results", str(results), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    quality["page"].main()
    text = (out / "quality.md").read_text()
    assert "| `ties` | weights | 1 |" in text
    assert "`arcee_fusion` (PlanError: arcee_fusion takes 1 experts" in text
    data = json.loads((out / "quality.json").read_text())
    one = data["benchmarks"][0]
    first, second = one["answers"]
    assert first["method"] == "ties"  # the only one of weights that is not what it is compared with
    assert (first["asked"], first["over"], first["seeds"]) == (5.0, "task_arithmetic", 1)
    assert second["method"] == "ties"
    assert f"**{first['answer']}**: `ties` (the best of 1 by validation score)" in text
    assert {m["name"] for m in one["methods"]} == {"task_arithmetic", "ties"}
    rows = [r for r in bench.book.rows.values() if (r["kind"], r["method"]) == ("test", "ties")]
    ties = next(m for m in one["methods"] if m["name"] == "ties")
    assert ties["mean"] in [float(f"{row['mean']:.6g}") for row in rows]
    assert (out / "quality_vision.svg").read_text().startswith("<svg")
