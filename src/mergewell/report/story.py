"""What the results say, in plain sentences: the verdict, the merge to take, the reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mergewell.report.findings import worst_level
from mergewell.report.numbers import counted, fixed, in_words, percent
from mergewell.report.results import Cutoffs, LayerMLoss, Level, Merge, Results

WELL, PARTLY = 0.95, 0.75
"""Retention from which a merge is called good, and fair."""

LONG = 100
"""Characters from which a verdict is parted at its colon."""

MODE_WORDS = {
    "merged": "merged (each layer is fed by the layers before it, already merged)",
    "pretrained": "pretrained (each layer is fed by the base)",
    "own": "own (each expert runs on its own path)",
}


@dataclass(frozen=True, slots=True)
class Merit:
    """How much of the experts' accuracy a merge keeps."""

    method: str
    mean: float
    low: float | None
    high: float | None
    worst_task: str
    worst: float


@dataclass(frozen=True, slots=True)
class Against:
    """How one merge compares with the ensemble, as means over the tasks."""

    method: str
    agreement: float | None
    """Share of inputs on which both choose the same answer."""
    kl: float | None
    """KL divergence from the ensemble, in nats."""
    gap: float | None
    """Accuracy of the merge minus that of the ensemble."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The page's first sentence, and what did not fit into it.

    `foreseen` is what the check said before any merge.
    """

    level: Level
    sentence: str
    foreseen: str = ""
    detail: str = ""


def ranking(results: Results) -> tuple[Merit, ...]:
    """Return all merges, best mean retention first; measured intervals where given.

    Without given retentions: the mean over tasks of merged over expert accuracy.
    """
    expert = results.accuracy.expert
    found: list[Merit] = []
    for method, merged in results.accuracy.merged.items():
        by_task = {task: merged[task] / expert[task] for task in expert if expert[task] > 0}
        worst_task = min(by_task, key=by_task.__getitem__, default="")
        worst = by_task.get(worst_task, 0.0)
        held = results.retention.get(method)
        if held is not None:
            if held.worst is not None:
                worst_task, worst = held.worst.task, held.worst.value
            found.append(Merit(method, held.mean, held.low, held.high, worst_task, worst))
        elif by_task:
            mean = math.fsum(by_task.values()) / len(by_task)
            found.append(Merit(method, mean, None, None, worst_task, worst))
    return tuple(sorted(found, key=lambda merit: -merit.mean))


def as_good(merits: Sequence[Merit]) -> tuple[str, ...]:
    """Return the merges whose mean lies within the best one's interval."""
    if not merits or merits[0].low is None:
        return ()
    return tuple(merit.method for merit in merits[1:] if merit.mean >= merits[0].low)


def against_ensemble(results: Results) -> tuple[Against, ...]:
    """Return each merge beside the ensemble, best merge first; empty where nothing is known."""
    ensemble = _mean(results.accuracy.ensemble)
    rows: list[Against] = []
    for merit in ranking(results):
        merged = _mean(results.accuracy.merged[merit.method])
        gap = merged - ensemble if merged is not None and ensemble is not None else None
        agreement = _mean(results.agreement.get(merit.method, {}))
        rows.append(Against(merit.method, agreement, _mean(results.kl.get(merit.method, {})), gap))
    known = any(row.agreement is not None or row.kl is not None for row in rows)
    return tuple(rows) if known else ()


def _mean(values: Mapping[str, float]) -> float | None:
    return math.fsum(values.values()) / len(values) if values else None


def verdict(results: Results) -> Verdict:
    """Return the verdict: measured where merges were evaluated, else as the check foresaw it."""
    merits, check = ranking(results), results.check
    foreseen = check.verdict if check else ""
    if not merits:
        level = check_level(results)
        first, _, rest = foreseen.partition(": ")
        if rest and len(foreseen) > LONG:
            return Verdict(level, f"{first}.", detail=rest[:1].upper() + rest[1:])
        return Verdict(level, foreseen or "Nothing was checked or merged yet.")
    best, count = merits[0], len(results.experts) or len(results.tasks)
    kept = f"{percent(best.mean)} of the experts’ accuracy"
    if best.mean >= WELL:
        sentence = f"They merge well: {best.method} keeps {kept}"
        sentence += f", one network instead of {in_words(count)}."
        return Verdict("good", sentence, foreseen)
    if best.mean >= PARTLY:
        sentence = f"They merge at a price: the best merge, {best.method}, keeps {kept}."
        return Verdict("fair", sentence, foreseen)
    sentence = f"They do not merge well: even the best merge, {best.method}, keeps only {kept}."
    return Verdict("poor", sentence, foreseen)


def check_level(results: Results) -> Level:
    """Return the check's own level, else its worst deciding finding, else its worst layer."""
    check = results.check
    if check and check.level:
        return check.level
    if check and (check.findings or not results.layers):
        return worst_level(check)
    held = [results.cutoffs.level(layer.relative) for layer in results.layers]
    return "poor" if "poor" in held else "fair" if "fair" in held else "good"


def command_of(results: Results, method: str) -> Merge | None:
    """Return how a merge was made, if that is known."""
    return next((merge for merge in results.merges if merge.method == method), None)


def layer_sentence(layers: Sequence[LayerMLoss]) -> str:
    """Return what the M-Loss by layer shows."""
    worst = max(layers, key=lambda layer: layer.relative)
    if worst.relative == 0:
        return "Merging changes no layer’s output: the experts are the same where it was measured."
    middle = median(layer.relative for layer in layers)
    return (
        f"Merging changes the output of the median of {len(layers)} layers by "
        f"{percent(middle, 2)}; at most by {percent(worst.relative, 2)}, in {worst.layer}."
    )


def node_sentence(layers: Sequence[LayerMLoss]) -> str:
    """Return how unevenly the nodes of a layer share its M-Loss."""
    shares = [concentration(layer.node) for layer in layers if sum(layer.node) > 0]
    if not shares:
        return "No node has any M-Loss."
    return (
        f"In the typical layer, {percent(median(shares), 0)} of the nodes make half of the M-Loss."
    )


def head_sentence(layers: Sequence[LayerMLoss]) -> str:
    """Return which attention head loses most; empty without heads."""
    heads = [
        (value, index, layer.layer) for layer in layers for index, value in enumerate(layer.heads)
    ]
    if not heads:
        return ""
    value, index, name = max(heads, key=lambda head: head[0])
    middle = median(value for value, _, _ in heads)
    return (
        f"The median of {counted(len(heads), 'head')} loses {percent(middle, 2)} of its output; "
        f"most loses head {index} of {name}, {percent(value, 2)}."
    )


def concentration(node: Sequence[float]) -> float:
    """Return the least fraction of nodes that together make half of the layer's M-Loss."""
    half, reached = math.fsum(node) / 2, 0.0
    for count, value in enumerate(sorted(node, reverse=True), start=1):
        reached += value
        if reached >= half:
            return count / len(node)
    return 1.0


def cosine_sentence(results: Results) -> str:
    """Return how the experts' task vectors lie to one another."""
    names, held = results.experts, results.cosine_matrix
    pairs = [
        (value, names[i], names[j])
        for i, row in enumerate(held)
        for j, value in enumerate(row)
        if i < j and value is not None
    ]
    if not pairs:
        return ""
    (low, *_), (high, one, other) = min(pairs), max(pairs)
    span = f"cosines from {fixed(low)} to {fixed(high)}" if len(pairs) > 1 else f"{fixed(high)}"
    if high >= 0.5:
        return (
            f"{one} and {other} moved the same way ({span}): they share much of what they learned."
        )
    if low <= -0.1:
        return f"Some experts pull against each other ({span}): expect them to cost accuracy."
    if high < 0.2:
        return f"The task vectors are nearly orthogonal ({span}): each expert moved its own way."
    return f"The task vectors overlap a little ({span})."


def reasons(results: Results) -> tuple[str, ...]:
    """Return what supports the verdict beside the findings: ensemble, base, worst task."""
    merits = ranking(results)
    if not merits:
        return ()
    accuracy, best = results.accuracy, merits[0]
    mean = {
        name: math.fsum(values.values()) / len(values)
        for name, values in (
            ("base", accuracy.base),
            ("ensemble", accuracy.ensemble),
            ("experts", accuracy.expert),
            ("merge", accuracy.merged[best.method]),
        )
        if values
    }
    said = [f"Its mean accuracy is {percent(mean['merge'])}; the experts have"]
    said[0] += f" {percent(mean['experts'])}"
    for name in ("ensemble", "base"):
        said[0] += f", the {name} {percent(mean[name])}" if name in mean else ""
    said[0] += "."
    alone = [
        accuracy.base[task] / own
        for task, own in accuracy.expert.items()
        if own and task in accuracy.base
    ]
    if alone:
        share = percent(math.fsum(alone) / len(alone))
        said.append(f"The base alone, without any merge, has {share} of the experts’ accuracy.")
    if best.worst_task:
        said.append(f"Its weakest task is {best.worst_task}, where it keeps {percent(best.worst)}.")
    if results.units:
        said.append(
            f"Layer by layer M-Loss is {_levels(results.units, results.cutoffs)}; small gaps "
            "add up over the layers."
        )
    return tuple(said)


def _levels(layers: Sequence[LayerMLoss], cutoffs: Cutoffs) -> str:
    poor = sum(cutoffs.level(layer.relative) == "poor" for layer in layers)
    good = sum(cutoffs.level(layer.relative) == "good" for layer in layers)
    said = f"good in {good} of {counted(len(layers), 'layer')}"
    return f"{said} and poor in {poor}" if poor else said
