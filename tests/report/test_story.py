from typing import Any

import pytest

from mergewell.report import story
from mergewell.report.results import LayerMLoss, Results, validated

Data = dict[str, Any]


def told(example: Data) -> Results:
    return validated(Results, example, where="example")


def test_merges_are_ranked_by_their_retention(example: Data) -> None:
    merits = story.ranking(told(example))
    assert [merit.method for merit in merits] == ["ties", "task_arithmetic", "average"]
    assert merits[0].worst_task == "sign_digits"


def test_without_measured_retention_it_is_the_mean_over_tasks(example: Data) -> None:
    del example["retention"]
    best = story.ranking(told(example))[0]
    ratios = [0.956 / 0.984, 0.821 / 0.893, 0.873 / 0.967, 0.802 / 0.951]
    assert best.mean == pytest.approx(sum(ratios) / 4)
    assert (best.low, best.worst_task) == (None, "sign_digits")
    assert best.worst == pytest.approx(0.802 / 0.951)


def test_an_expert_that_is_never_right_is_left_out_of_the_mean(example: Data) -> None:
    del example["retention"]
    example["accuracy"]["expert"]["mnist"] = 0.0
    assert story.ranking(told(example))[0].mean < 1


def test_merges_within_the_best_interval_are_as_good(example: Data) -> None:
    example["retention"]["ties"]["low"] = example["retention"]["average"]["mean"]
    assert story.as_good(story.ranking(told(example))) == ("task_arithmetic", "average")
    example["retention"]["ties"]["low"] = example["retention"]["ties"]["mean"] - 1e-6
    assert story.as_good(story.ranking(told(example))) == ()


@pytest.mark.parametrize(
    ("mean", "level", "words"),
    [
        (0.97, "good", "They merge well: ties keeps 97.0"),
        (0.95, "good", "one network instead of four."),
        (0.94, "fair", "They merge at a price"),
        (0.5, "poor", "They do not merge well: even the best merge, ties, keeps only"),
    ],
)
def test_the_verdict_follows_the_measured_retention(
    example: Data, mean: float, level: str, words: str
) -> None:
    example["retention"] = {"ties": {"mean": mean}}
    del example["accuracy"]["merged"]["average"], example["accuracy"]["merged"]["task_arithmetic"]
    example["intervals"] = {}
    verdict = story.verdict(told(example))
    assert verdict.level == level
    assert words in verdict.sentence
    assert verdict.foreseen == example["check"]["verdict"]


def test_without_merges_the_check_speaks(example: Data) -> None:
    del example["check"]["level"]
    results = Results.of_check(told(example).check)  # type: ignore[arg-type]
    assert story.verdict(results) == story.Verdict("poor", example["check"]["verdict"])


def test_a_long_verdict_is_parted_at_its_colon(example: Data) -> None:
    example["check"]["verdict"] = f"These experts look mergeable: in {'very ' * 20}few layers."
    verdict = story.verdict(Results.of_check(told(example).check))  # type: ignore[arg-type]
    assert verdict.sentence == "These experts look mergeable."
    assert verdict.detail.startswith("In very") and verdict.detail.endswith("layers.")


def test_half_of_the_loss_in_how_many_nodes() -> None:
    assert story.concentration((1.0, 1.0, 1.0, 1.0)) == 0.5
    assert story.concentration((8.0, 1.0, 1.0, 1.0)) == 0.25
    layers = [
        LayerMLoss(layer="x", activation="relu", nodes=4, absolute=1, relative=0, node=(8, 1, 1, 1))
    ]
    assert story.node_sentence(layers).startswith("In the typical layer, 25")


def test_identical_experts_are_said_to_change_nothing() -> None:
    layers = [LayerMLoss(layer="x", activation="relu", nodes=1, absolute=0, relative=0, node=(0,))]
    assert story.layer_sentence(layers).startswith("Merging changes no layer")
    assert story.node_sentence(layers) == "No node has any M-Loss."


@pytest.mark.parametrize(
    ("cosine", "words"),
    [(0.05, "nearly orthogonal"), (0.3, "overlap a little"), (0.6, "the same way"), (-0.3, "pull")],
)
def test_the_cosines_in_words(example: Data, cosine: float, words: str) -> None:
    example["models"]["experts"] = ["a", "b"]
    example["cosines"] = [[1.0, cosine], [cosine, 1.0]]
    assert words in story.cosine_sentence(told(example))


def test_the_reasons_name_what_supports_the_verdict(example: Data) -> None:
    first, base, second, third = story.reasons(told(example))
    assert base.startswith("The base alone, without any merge, has ")
    assert "86.3" in first and "94.9" in first and "the ensemble 83.4" in first
    assert second.startswith("Its weakest task is sign_digits")
    assert "of 34 layers" in third


def test_the_head_that_loses_most_is_named() -> None:
    rows = [
        LayerMLoss(
            layer=name, activation="attention", nodes=1, absolute=0, relative=0,
            kind="attention", heads=heads,
        )
        for name, heads in (("h.0", (0.01, 0.02)), ("h.1", (0.03, 0.5, 0.01)))
    ]  # fmt: skip
    said = story.head_sentence(rows)
    assert "median of 5 heads loses 2.00" in said and "head 1 of h.1, 50.00" in said
    assert story.head_sentence([]) == ""


def test_merges_stand_beside_the_ensemble_best_first(example: Data) -> None:
    first, *_, last = story.against_ensemble(told(example))
    assert (first.method, last.method) == ("ties", "average")
    assert first.gap == pytest.approx((0.956 + 0.821 + 0.873 + 0.802) / 4 - 0.834)
    assert first.agreement == pytest.approx(0.86)
    example["agreement"] = example["kl"] = {}
    assert story.against_ensemble(told(example)) == ()
