"""Does the loss rise between the models?"""

from __future__ import annotations

from typing import ClassVar

import torch

from mergewell.diagnostics.base import Diagnostic, Evidence, Finding, level_of
from mergewell.diagnostics.ops import mean
from mergewell.models.barrier import IGNORED, Answers, Path, score


class Barrier(Diagnostic):
    """Does the loss rise between the models?

    On the line from a to b: max over s of L(s) - ((1 - s) L(a) + s L(b)), L the mean cross-entropy
    in nats; the same of accuracy. At the merge: L(merged) - sum_k c_k L(expert k), which is
    negative where the merge is better than its experts are on average. Without labels the answers
    are those of the ensemble of the models compared.

    Paper: Frankle et al. 2020, arXiv:1912.05671; Ainsworth et al. 2022, arXiv:2209.04836.
    Departures: pseudo-labels are as good as the ensemble, whose answers a uniform mean of experts
    of different tasks blurs; so it does not decide the verdict, although by labels it measures what
    merging costs. The levels are reading aids.
    """

    decides: ClassVar[bool] = False
    asks: ClassVar[str] = (
        "Asks for logits and forward passes along a line: `mergewell.models.barrier.measure_path` "
        "makes its evidence, in Python."
    )

    def measure(self, evidence: Evidence) -> Finding | None:
        """Return the highest of the barriers as the value."""
        merge, answers = _at_the_merge(evidence)
        heights = {_name(path): path.barrier for path in evidence.paths}
        if merge is not None:
            heights["the merge"] = merge[0]
        if not heights:
            return None
        answers = evidence.paths[0].answers if evidence.paths else answers
        worst = max(heights, key=heights.__getitem__)
        value = heights[worst]
        matrix = _matrix(evidence)
        predictors: dict[str, object] = {"barrier": value}
        if evidence.paths:
            predictors["barrier_mean"] = mean([path.barrier for path in evidence.paths])
            predictors["barrier_accuracy"] = max(path.accuracy_barrier for path in evidence.paths)
        if matrix is not None:
            predictors["barrier_pairs"] = matrix
        if merge is not None:
            predictors |= {"barrier_merge": merge[0], "barrier_merge_accuracy": merge[1]}
        return Finding(
            question="Does the loss rise between the models?",
            verdict=(
                f"By {answers}, the loss rises up to {value:.2g} nats above that of the models "
                f"compared, most at {worst}."
                if value > 0
                else f"By {answers}, the loss is nowhere above that of the models compared."
            ),
            level=level_of(value, good=0.1, poor=0.5),
            where=worst,
            value=value,
            unit="nats of cross-entropy",
            advice=(
                "A barrier of this height means different basins: match the models' units first, "
                "repair normalisation, or merge fewer experts."
                if value >= 0.5
                else ""
            ),
            predictors=predictors,
            by_place=heights,
        )


def _name(path: Path) -> str:
    return f"{path.start} to {path.end}" + (f" on {path.task}" if path.task else "")


def _at_the_merge(evidence: Evidence) -> tuple[tuple[float, float] | None, Answers]:
    """Return how far the merge's loss is above, and its accuracy below, the experts' mean."""
    if evidence.outputs is None or not evidence.logits:
        return None, "labels"
    experts, merged = evidence.outputs[1:-1].float(), evidence.outputs[-1].float()
    given = evidence.coefficients or (1 / len(experts),) * len(experts)
    shares = torch.tensor(given, dtype=experts.dtype)
    answers = evidence.labels
    if answers is None:
        answers = (experts * shares[:, None, None]).sum(0).argmax(-1)
    if not bool((answers != IGNORED).any()):
        return None, "labels"
    scores = [score([model], [answers]) for model in (*experts, merged)]
    loss = scores[-1][0] - sum(c * s[0] for c, s in zip(given, scores, strict=False))
    accuracy = sum(c * s[1] for c, s in zip(given, scores, strict=False)) - scores[-1][1]
    return (loss, accuracy), "pseudo-labels" if evidence.labels is None else "labels"


def _matrix(evidence: Evidence) -> list[list[float | None]] | None:
    """Return the mean barrier between experts over tasks, None where no path was run."""
    found: dict[tuple[str, str], list[float]] = {}
    for path in evidence.paths:
        found.setdefault((path.start, path.end), []).append(path.barrier)
    names = evidence.experts
    rows: list[list[float | None]] = [
        [0.0 if a == b else _either(found, a, b) for b in names] for a in names
    ]
    known = any(v is not None for i, row in enumerate(rows) for j, v in enumerate(row) if i != j)
    return rows if known else None


def _either(found: dict[tuple[str, str], list[float]], a: str, b: str) -> float | None:
    values = found.get((a, b), []) + found.get((b, a), [])
    return mean(values) if values else None
