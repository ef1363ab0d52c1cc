import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergewell.errors import DataError, ModelError, RecipeError
from mergewell.evaluate import EvaluationTask, estimate, evaluate, kl_divergence, resampled_means

THREE = math.log(3.0)


class Table(nn.Module):
    """A model that answers example i with row i of a table, and counts its calls."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)
        self.calls: list[Tensor] = []
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, index: Tensor) -> Tensor:
        self.calls.append(index)
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        return self.rows[index]


def task(
    labels: list[int],
    *,
    name: str = "digits",
    expert: str = "a",
    head: Callable[[Tensor], Tensor] = lambda features: features,
) -> EvaluationTask:
    """Examples 0, 1, ... in batches of two."""
    batches = torch.arange(len(labels)).split(2)
    return EvaluationTask(name, batches, torch.tensor(labels), head, expert)


def models() -> dict[str, nn.Module]:
    """On labels 0 0 1 1: a is right on all, b on the first two, merged on the first three."""
    return {
        "a": Table([[THREE, 0.0], [THREE, 0.0], [0.0, THREE], [0.0, 1.0]]),
        "b": Table([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [9.0, 0.0]]),
        "merged": Table([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
    }


def run(tasks: list[EvaluationTask] | None = None, **changed: object):
    """Evaluate with the usual arguments but the changed ones."""
    arguments = {"ensemble": ("a", "b"), "ensemble_kind": "logits"} | changed
    return evaluate(models(), tasks or [task([0, 0, 1, 1])], **arguments)  # pyright: ignore


def test_accuracy_retention_and_agreement_by_hand():
    result = run()
    merged = result.models["merged"]
    assert merged.accuracy["digits"].value == 0.75
    assert merged.retention["digits"].value == 0.75
    # the ensemble's mean logits: 0, 0, then [0.5, 1.65] -> 1, and [4.5, 0.5] -> 0
    assert result.models["ensemble"].accuracy["digits"].value == 0.75
    assert merged.agreement["digits"].value == 1.0
    assert result.models["b"].agreement["digits"].value == 0.75
    assert result.ensemble_kind == "logits" and result.examples == {"digits": 4}


def test_divergence_is_from_the_ensemble_to_the_model_in_nats():
    # ensemble = a: (3/4, 1/4); b: (1/2, 1/2): KL(ensemble || b) = ln 2 - H(3/4)
    pair = {"a": Table([[THREE, 0.0]]), "b": Table([[0.0, 0.0]])}
    result = evaluate(pair, [task([0])], ensemble=("a",), ensemble_kind="logits")
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert result.models["b"].divergence["digits"].value == pytest.approx(expected, rel=1e-6)
    assert result.models["a"].divergence["digits"].value == 0.0


def test_kl_divergence_of_equal_distributions_is_zero_and_else_positive():
    logs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert torch.equal(kl_divergence(logs, logs), torch.zeros(5))
    assert (kl_divergence(logs, logs.roll(1, 0)) > 0).all()


def test_the_kind_of_the_ensemble_decides_where_the_head_bends():
    # a head that doubles negatives: mean of features 1 -> class 0; mean of logits 0.5*(4-2*2)=0
    def head(features: Tensor) -> Tensor:
        bent = torch.where(features < 0, 3 * features, features)
        return torch.cat([bent, torch.zeros_like(bent)], dim=1)

    pair = {"a": Table([[4.0]]), "b": Table([[-2.0]])}
    answers = {
        kind: evaluate(pair, [task([0], head=head)], ensemble=("a", "b"), ensemble_kind=kind)
        .models["ensemble"]
        .accuracy["digits"]
        .value
        for kind in ("features", "logits")
    }
    assert answers == {"features": 1.0, "logits": 0.0}


def test_every_model_sees_every_batch_once_in_eval_mode_without_gradients():
    given = models()
    given["b"].train()
    given["a"].eval()
    tasks = [task([0, 0, 1, 1]), task([1, 0, 1], name="other", expert="b")]
    evaluate(given, tasks, ensemble=("a", "b"), ensemble_kind="features")
    for module in given.values():
        assert isinstance(module, Table)
        batches = [batch for each in tasks for batch in each.batches]
        assert [id(call) for call in module.calls] == [id(batch) for batch in batches]
        assert set(module.modes) == {(False, True)}
    assert given["b"].training and not given["a"].training


def test_means_over_tasks_and_the_worst_task():
    tasks = [task([0, 0, 1, 1]), task([0, 0, 0], name="other", expert="b")]
    merged = run(tasks).models["merged"]
    assert merged.mean_accuracy.value == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert merged.mean_retention.value == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert merged.worst_task == "other"


def test_retention_is_not_a_number_where_the_expert_is_never_right():
    tasks = [task([1, 1, 0, 0]), task([0, 0, 0], name="other", expert="b")]
    result = run(tasks).models["merged"]
    assert math.isnan(result.retention["digits"].value)
    assert math.isnan(result.mean_retention.value)
    assert result.worst_task == "other"


def test_intervals_hold_the_value_and_an_expert_retains_itself():
    result = run()
    merged = result.models["merged"].accuracy["digits"]
    assert merged.low < merged.value < merged.high
    itself = result.models["a"].retention["digits"]
    assert (itself.low, itself.value, itself.high) == (1.0, 1.0, 1.0)


def test_resampled_means_spread_as_the_binomial_does():
    scores = np.zeros((1, 400))
    scores[0, :320] = 1.0
    draws = resampled_means(scores, seed=0)
    assert draws.shape == (2000, 1)
    assert draws.mean() == pytest.approx(0.8, abs=0.002)
    assert draws.std() == pytest.approx(math.sqrt(0.8 * 0.2 / 400), rel=0.06)
    interval = estimate(0.8, draws[:, 0])
    assert interval.low == pytest.approx(0.8 - 1.96 * 0.02, abs=0.004)
    assert interval.high == pytest.approx(0.8 + 1.96 * 0.02, abs=0.004)


def test_resamples_are_paired_across_rows():
    scores = np.random.default_rng(0).integers(2, size=(2, 50)).astype(float)
    draws = resampled_means(np.stack([scores, scores + 1]), seed=3, resamples=150)
    assert draws.shape == (150, 2, 2)
    assert np.allclose(draws[:, 1] - draws[:, 0], 1.0)


def test_the_seed_alone_decides_the_intervals():
    generator = torch.Generator().manual_seed(0)
    one: dict[str, nn.Module] = {"a": Table(torch.randn(37, 2, generator=generator).tolist())}
    first, again = (
        evaluate(one, [task([0] * 37)], ensemble=("a",), ensemble_kind="logits", seed=5)
        for _ in range(2)
    )
    assert first == again
    draws = [resampled_means(np.random.default_rng(0).random((1, 37)), seed=s) for s in (5, 6)]
    assert not np.array_equal(*draws)


def test_every_task_has_its_own_resamples_and_seeds_differ():
    table = Table([[float(i % 7), math.sqrt(i) * 1.3] for i in range(41)])
    pair: dict[str, nn.Module] = {"a": table, "b": Table([[0.0, 0.0]] * 41)}
    tasks = [task([0] * 41), task([0] * 41, name="other")]
    lows: list[float] = []
    for seed in (1, 2):
        result = evaluate(pair, tasks, ensemble=("a",), ensemble_kind="logits", seed=seed)
        lows += [result.models["b"].divergence[name].low for name in ("digits", "other")]
    assert len(set(lows)) == 4


def test_an_ensemble_of_probabilities_lets_two_outvote_a_sure_one():
    three: dict[str, nn.Module] = {
        "a": Table([[30.0, 0.0]]),
        "b": Table([[0.0, 4.0]]),
        "c": Table([[0.0, 4.0]]),
    }
    right = {
        kind: evaluate(three, [task([1])], ensemble=("a", "b", "c"), ensemble_kind=kind)
        .models["ensemble"]
        .accuracy["digits"]
        .value
        for kind in ("logits", "probabilities")
    }
    assert right == {"logits": 0.0, "probabilities": 1.0}


def test_progress_counts_batches_of_all_models():
    seen: list[tuple[str, int, int]] = []
    run(on_progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1] == ("merged", 6, 6)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 0, 1, 2], "label 2 but its head knows 2"),
        ([0, -1, 1, 1], "whole numbers from 0"),
        ([0.0, 1.0], "whole numbers from 0"),
        ([], "no examples"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: list[int], words: str):
    with pytest.raises(DataError, match=words):
        run([task(labels)])


def test_more_labels_than_outputs_are_refused():
    short = EvaluationTask("digits", [torch.tensor([0])], torch.tensor([0, 1]), lambda x: x, "a")
    with pytest.raises(DataError, match="2 labels but its batches give 1"):
        run([short])


def test_a_head_of_another_width_is_refused():
    with pytest.raises(DataError, match=r"head of task 'digits' does not take .* \(4, 2\)"):
        run([task([0, 0, 1, 1], head=lambda features: features @ torch.zeros(3, 2))])


def test_a_head_that_pools_the_examples_is_refused():
    with pytest.raises(DataError, match="one row of logits an example"):
        run([task([0, 0, 1, 1], head=lambda features: features[:1])])


def test_damaged_models_are_named():
    broken = models() | {"merged": Table([[math.nan, 0.0]] * 4)}
    with pytest.raises(ModelError, match="'merged' gives outputs that are not finite"):
        evaluate(broken, [task([0, 0, 1, 1])], ensemble=("a",), ensemble_kind="logits")


def test_names_that_do_not_exist_are_refused_before_anything_runs():
    given = models()
    one = [task([0, 0, 1, 1])]
    with pytest.raises(DataError, match="did you mean 'merged'"):
        evaluate(given, one, ensemble=("merge",), ensemble_kind="logits")
    with pytest.raises(DataError, match="unknown expert 'z'"):
        evaluate(given, [task([0], expert="z")], ensemble=("a",), ensemble_kind="logits")
    with pytest.raises(DataError, match="no task"):
        evaluate(given, [], ensemble=("a",), ensemble_kind="logits")
    with pytest.raises(DataError, match="one name"):
        evaluate(given, one * 2, ensemble=("a",), ensemble_kind="logits")
    with pytest.raises(DataError, match="own ensemble"):
        evaluate(given | {"ensemble": given["a"]}, one, ensemble=("a",), ensemble_kind="logits")
    with pytest.raises(RecipeError, match="no experts"):
        evaluate(given, one, ensemble=(), ensemble_kind="logits")
    with pytest.raises(RecipeError, match="votes"):
        run(one, ensemble_kind="votes")
    assert all(isinstance(m, Table) and not m.calls for m in given.values())
