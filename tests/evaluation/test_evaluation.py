"""Measures and comparisons by hand, the command, and the lm-eval harness where it is installed."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import language_toys
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mergewell.cli.main import main
from mergewell.errors import DataError, ModelError, RecipeError, UserError
from mergewell.evaluation.base import Goal, Measure
from mergewell.evaluation.compared import compare
from mergewell.evaluation.function import function_measure, of_function
from mergewell.evaluation.harness import harness_measure
from mergewell.evaluation.labelled import accuracy_on
from mergewell.evaluation.perplexity import perplexity_on
from mergewell.labelled import LabelledInputs
from mergewell.learners.base import LEARNERS, Material
from mergewell.recipe import make_recipe
from mergewell.tune.search import tune
from mergewell.tune.space import candidates


class Table(nn.Module):
    """Answers example i with row i of a table."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, index: Tensor) -> Tensor:
        return self.rows[index]


class Line(nn.Module):
    """One number a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))


def three_is_best(module: nn.Module) -> float:
    """A metric of anybody's: how near the weights are to (3, 3)."""
    return -float((module.get_parameter("w") - 3).abs().sum())


def mean_weight(module: nn.Module) -> Tensor:
    return next(iter(module.parameters())).detach().flatten()[:5]


LABELLED = LabelledInputs((torch.tensor([0, 1]), torch.tensor([2, 3])), torch.tensor([0, 0, 1, 1]))
MODELS = {
    "a": Table([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
    "b": Table([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]),
    "merged": Table([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
}


def test_accuracy_and_retention_by_hand() -> None:
    tasks = [accuracy_on("one", LABELLED, expert=0), accuracy_on("two", LABELLED, expert=1)]
    found = compare(MODELS, tasks, experts=["a", "b"])
    merged = found.models["merged"]
    assert merged.values["one"].value == 0.75
    assert 0 <= merged.values["one"].low < 0.75 < merged.values["one"].high <= 1
    assert (merged.retention["one"].value, merged.retention["two"].value) == (0.75, 1.5)
    assert merged.worst_task == "one" and merged.mean_retention is not None
    assert merged.mean_retention.value == 1.125
    assert found.models["a"].retention["one"].low == 1.0  # paired: it is itself in every resample
    json.dumps(found.as_data(), allow_nan=False)


def test_a_task_of_nobody_is_held_against_the_best_expert() -> None:
    found = compare(MODELS, [accuracy_on("one", LABELLED)], experts=["b", "a"])
    assert found.experts == {"one": "a"}
    assert compare(MODELS, [accuracy_on("one", LABELLED)]).models["a"].retention == {}


class Reader(nn.Module):
    """Says of every next token that it is 1 with probability 3/4, of three tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.tensor([1 / 8, 3 / 4, 1 / 8]).log().expand(*input_ids.shape, 3)


def test_perplexity_by_hand_leaves_padding_out_and_retains_by_the_inverse() -> None:
    ids = torch.tensor([[0, 1, 1], [1, 2, 2]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    measure = perplexity_on("texts", [{"input_ids": ids, "attention_mask": mask}], expert=0)
    due = math.exp(-(2 * math.log(3 / 4) + math.log(1 / 8)) / 3)
    uniform = type("U", (Reader,), {"forward": lambda s, input_ids, attention_mask: torch.zeros(
        *input_ids.shape, 3)})()  # fmt: skip
    found = compare({"a": Reader(), "b": uniform}, [measure], experts=["a"])
    assert found.models["a"].values["texts"].value == pytest.approx(due)
    assert found.models["b"].values["texts"].value == pytest.approx(3)
    assert found.models["b"].retention["texts"].value == pytest.approx(due / 3)


def test_a_function_may_give_one_number_or_one_an_example() -> None:
    one = of_function(three_is_best, name="three")
    found = compare({"line": Line()}, [one]).models["line"].values["three"]
    assert found.value == -6.0 and math.isnan(found.low)  # one number has no interval
    many = of_function(lambda module: [1.0, 2.0, 3.0, 6.0], name="many")
    found = compare({"line": Line()}, [many]).models["line"].values["many"]
    assert found.value == 3.0 and found.low < 3.0 < found.high


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot be imported"):
        function_measure("no_such_module:score")
    with pytest.raises(RecipeError, match="returned str; return a number"):
        of_function(lambda module: "good", name="word").scores(Line())
    with pytest.raises(RecipeError, match="raised ZeroDivisionError"):
        of_function(lambda module: 1 / 0, name="zero").scores(Line())
    with pytest.raises(ModelError, match="not a finite number"):
        of_function(lambda module: float("nan"), name="nan").scores(Line())
    with pytest.raises(DataError, match="has no labels"):
        accuracy_on("one", LabelledInputs(LABELLED.batches))
    with pytest.raises(DataError, match="has the label 7, but Table knows 2"):
        wrong = LabelledInputs(LABELLED.batches, torch.tensor([0, 0, 1, 7]))
        accuracy_on("one", wrong).scores(MODELS["a"])
    with pytest.raises(DataError, match="a name of its own"):
        compare(MODELS, [accuracy_on("one", LABELLED)] * 2)
    with pytest.raises(DataError, match="different numbers of scores"):
        sizes = iter(([1.0], [1.0, 2.0]))
        odd = Measure("odd", "odd", lambda module: np.array(next(sizes)))
        compare({"a": Line(), "b": Line()}, [odd])


def family(folder: Path) -> tuple[Path, list[Path]]:
    found: list[Path] = []
    for name, value in (("base", 0.0), ("low", 2.0), ("high", 4.0), ("far", -20.0)):
        found.append(folder / f"{name}.safetensors")
        save_file({"w": torch.full((2,), value)}, found[-1])
    return found[0], found[1:]


def test_greedy_soup_and_tune_take_any_function(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    wanted = make_recipe({"base": str(base), "experts": [{"path": str(e)} for e in experts]})
    goal = Goal([of_function(three_is_best, name="three")])
    learned = LEARNERS.build("greedy_soup", {}).learn(wanted, Material(Line, goal))
    assert [Path(each.path).stem for each in learned.recipe.experts] == ["low", "high"]
    assert learned.score == 0.0
    two = wanted.model_copy(update={"experts": wanted.experts[:2]})
    tried = candidates(["task_arithmetic"], budget=8, seed=0)
    tuned = tune(two, tried, goal, Line)  # pyright: ignore[reportArgumentType]
    assert tuned.tried[0].candidate.scale == 0.5  # 0.5 (2 + 4) = 3


def test_the_command_judges_a_merged_folder_beside_its_own_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = language_toys.family("bert classes", tmp_path, size=0.1)
    flags = [part for each in experts for part in ("--expert", str(each))]
    out = tmp_path / "out"
    assert main(["merge", "--base", str(base), *flags, "--out", str(out)]) == 0
    paths: list[str] = []
    for index in range(2):
        labels = torch.arange(8) % 2
        data = {"input_ids": torch.arange(4, 36).view(8, 4), "labels": labels}
        save_file(data, tmp_path / f"task{index}.safetensors")
        paths += ["--data", str(tmp_path / f"task{index}.safetensors")]
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "own_metrics", types.ModuleType("m"))
        sys.modules["own_metrics"].mean_weight = mean_weight  # type: ignore
        metric = "own_metrics:mean_weight"
        assert main(["evaluate", str(out), *paths, "--metric", metric, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["models"]) == ["base", "expert0", "expert1", "out"]
    assert told["tasks"]["task1"] == {"metric": "accuracy", "examples": 8, "expert": "expert1"}
    assert told["tasks"][metric]["examples"] == 5
    assert told["models"]["expert1"]["retention"]["task1"]["value"] == 1.0
    assert main(["evaluate", str(out), *paths]) == 0
    shown = capsys.readouterr().out
    assert "task0: accuracy (8 examples, retention against expert0)" in shown
    assert "retention over all tasks" in shown
    assert main(["evaluate", str(out)]) == 2
    assert "add --data PATH" in capsys.readouterr().err


TASK = """
task: arrows
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" a", " b"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def words(folder: Path) -> None:
    """Write a tokenizer of words beside a model."""
    vocab = {w: n for n, w in enumerate(["<unk>", "<s>", "</s>", "left", "right", "a", "b"])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
                "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "</s>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_harness_task_of_ones_own_runs_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    base, _ = language_toys.family("llama", tmp_path, experts=1)
    words(base)
    rows = [{"question": w, "answer": n} for w, n in (("left", 0), ("right", 1), ("left", 1))]
    file = tmp_path / "arrows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "arrows.yaml").write_text(TASK.replace("FILE", str(file)))
    measure = harness_measure(f"lm-eval:arrows@{tmp_path / 'tasks'}", model_folder=base)
    model = language_toys.loaded("llama", base)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        scores = measure.scores(model)
        with pytest.raises(DataError, match="cannot run it offline"):
            harness_measure("lm-eval:hellaswag", model_folder=base).scores(model)
    prompt = {"left": 3, "right": 4}
    due: list[float] = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([[prompt[row["question"]]]])).logits[0, -1]
        due.append(float(int(logits[6] > logits[5]) == row["answer"]))
    assert scores.tolist() == [due]


def test_a_missing_harness_or_task_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"pip install 'mergewell\[eval\]'"):
        harness_measure("lm-eval:arrows", model_folder=tmp_path)
    for name in ("lm-eval:", "lm-eval:x@", f"lm-eval:x@{tmp_path / 'none'}"):
        with pytest.raises(UserError, match="lm-eval:"):
            harness_measure(name, model_folder=tmp_path)
