"""Explanation: the three analyses together, on the same experts and the same samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergewell.explain.averaging import Averaging, compare_averaging
from mergewell.explain.split import find_classifier, run_split, soup
from mergewell.explain.stability import Stability, measure_stability
from mergewell.explain.templates import Templates, compare_templates
from mergewell.labelled import LabelledInputs, halves

OnStep = Callable[[str, int, int], None]
"""Called with the step's name, what is done of it and what there is to do."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What averaging does to some experts, and why."""

    experts: tuple[str, ...]
    samples: int
    """Samples that everything was judged on."""
    chosen_on: int
    """Other samples, on which greedy soups were chosen; 0 without labels."""
    labels: Literal["given", "ensemble"]
    """Whose classes the templates are of: the data's labels, or the logit ensemble's answers."""
    templates: Templates
    averaging: Averaging
    stability: Stability

    def sentences(self) -> tuple[str, ...]:
        """Return one sentence for each analysis."""
        return (self._of_templates(), self._of_averaging(), self._of_stability())

    def as_data(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "version": 1,
            "experts": list(self.experts),
            "samples": self.samples,
            "chosen_on": self.chosen_on,
            "labels": self.labels,
            "sentences": list(self.sentences()),
            "templates": self.templates.as_data(),
            "averaging": self.averaging.as_data(),
            "stability": self.stability.as_data(),
        }

    def _of_templates(self) -> str:
        cosines = [match.mean_cosine for match in self.templates.experts.values()]
        kept = list(self.templates.retention.values())
        return (
            f"Templates: the experts' classifier rows have a cosine of {_mean(cosines):.2f} with "
            f"their class means, and the averaged rows keep {100 * _mean(kept):.0f} % of it."
        )

    def _of_averaging(self) -> str:
        part = self.averaging.decompositions[-1]
        larger, smaller = (
            ("the nonlinearity gap", "the classifier covariance")
            if part.nonlinearity >= part.covariance
            else ("the classifier covariance", "the nonlinearity gap")
        )
        high, low = (
            max(part.nonlinearity, part.covariance),
            min(part.nonlinearity, part.covariance),
        )
        measured = " with re-estimated BatchNorms" if part.batch_norm == "reestimated" else ""
        return (
            f"Averaging: the soup's logits{measured} are {100 * part.difference:.2g} % of the "
            f"ensemble's norm away from the ensemble's; {larger} makes {100 * high:.2g} %, "
            f"{smaller} {100 * low:.2g} %."
        )

    def _of_stability(self) -> str:
        subject = "soup" if len(self.experts) > 1 else "single"
        scaling = self.stability.curve("magnitude", subject)
        noise = self.stability.curve("noise", subject)
        told: list[str] = []
        if scaling:
            far = max(scaling, key=lambda point: point.amount)
            told.append(
                f"{100 * far.agreement:.0f} % of its answers when every weight is multiplied by "
                f"{far.amount:g}"
            )
        if noise:
            middle = min(noise, key=lambda point: abs(point.amount - 0.1))
            told.append(f"{100 * middle.agreement:.0f} % under noise of {middle.amount:g}")
        name = "soup" if subject == "soup" else "expert"
        return f"Stability: the {name} keeps {' and '.join(told) or 'what was not measured'}."


def explain(
    experts: Mapping[str, nn.Module],
    data: LabelledInputs,
    *,
    classifier: str | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Explanation:
    """Return the three analyses of the experts' uniform average.

    Labelled samples at even places choose the greedy soups (and re-estimate BatchNorms), those at
    odd places judge everything. Without labels nothing has an accuracy, greedy soups are left out,
    and the templates' classes are the logit ensemble's answers.

    Raises:
        RecipeError: no experts.
        ModelError: a module cannot be split into features and a classifier.
        DataError: data that do not fit the modules, or too few.
    """
    choosing, judging = halves(data) if data.labels is not None else (None, data)
    step = _Steps(on_step)
    averaging = compare_averaging(
        experts, judging, choosing=choosing, classifier=classifier, seed=seed
    )
    step.done()
    modules = list(experts.values())
    layer = find_classifier(modules[0], judging.batches[0], name=classifier)
    own = {name: run_split(expert, layer, judging.batches) for name, expert in experts.items()}
    merged = run_split(soup(modules), layer, judging.batches)
    classes = judging.labels
    if classes is None:
        classes = _answers([one.logits for one in own.values()])
    templates = compare_templates(own, merged, classes)
    step.done()
    stability = measure_stability(
        modules, judging, classifier=classifier, measuring=choosing, seed=seed
    )
    step.done()
    return Explanation(
        tuple(experts),
        judging.samples,
        choosing.samples if choosing is not None else 0,
        "given" if judging.labels is not None else "ensemble",
        templates,
        averaging,
        stability,
    )


class _Steps:
    """Reports one analysis after the other."""

    def __init__(self, on_step: OnStep | None) -> None:
        self._on_step, self._count = on_step, 0
        self._tell()

    def done(self) -> None:
        self._count += 1
        self._tell()

    def _tell(self) -> None:
        if self._on_step is not None:
            self._on_step("analyses", self._count, 3)


def _answers(logits: list[Tensor]) -> Tensor:
    return torch.stack(logits).mean(0).argmax(-1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
