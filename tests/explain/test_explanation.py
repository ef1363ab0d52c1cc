"""The three analyses together."""

from __future__ import annotations

import json

from torch import nn

from mergewell.explain.explanation import explain
from mergewell.labelled import LabelledInputs


def test_everything_is_judged_on_samples_that_chose_nothing(
    experts: dict[str, nn.Module], data: LabelledInputs
) -> None:
    steps: list[tuple[str, int, int]] = []
    found = explain(experts, data, on_step=lambda *step: steps.append(step))
    assert (found.samples, found.chosen_on, found.labels) == (100, 100, "given")
    assert steps == [("analyses", done, 3) for done in range(4)]
    payload = json.loads(json.dumps(found.as_data(), allow_nan=False))
    assert payload["version"] == 1
    assert payload["experts"] == list(experts)
    assert len(payload["sentences"]) == 3
    assert {"templates", "averaging", "stability"} <= set(payload)


def test_without_labels_the_ensemble_says_the_classes(
    experts: dict[str, nn.Module], data: LabelledInputs
) -> None:
    found = explain(experts, LabelledInputs(data.batches))
    assert (found.samples, found.chosen_on, found.labels) == (200, 0, "ensemble")
    assert found.averaging.of("uniform_soup").accuracy is None
    assert all(point.accuracy is None for point in found.stability.points)
