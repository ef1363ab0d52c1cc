"""How much accuracy a choice without labels costs, from what `capture.py` captured.

    python benchmarks/tune/regret.py

Writes benchmarks/tune/results/FAMILY.jsonl (a row a set, objective, kind and number of inputs) and
docs/studies/tuning.json. Odd sets of small_cnn are those that the objective was developed on; what
is claimed is claimed of sets that no choice was made on. Regret: accuracy of the candidate that is
best on the tests minus that of the chosen one. That best one is chosen on the tests it is judged
by; `fair` is against the candidate that is best on one half of the tests, judged on the other. With
16 inputs a task the choice is made four times, on disjoint inputs, and the mean is taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import capture
import numpy as np
from book import rounded
from run import FAMILIES, cache_folder

from mergewell.tune.search import no_gain
from mergewell.tune.trying import by_merge

OUT = Path(__file__).parent / "results"
STUDY = Path(__file__).parents[2] / "docs/studies/tuning.json"
OBJECTIVES = (
    "anchored", "anchored, tasks alike", "answers", "expert", "mix", "ensemble",
    "expert and base, halves",
    "anchored, patience 15",
)  # fmt: skip
SHIPPED = OBJECTIVES[0]
INPUTS = (("fresh", 16), ("fresh", 64), ("learned", 64))
LOOKED = {"efficientnet": (1, 3), "minilm": (1,)}
"""Sets that were looked at before the rule was settled, besides odd ones of small_cnn."""

LEAST = 1e-3


def shares(logits: np.ndarray) -> np.ndarray:
    """Return probabilities."""
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def information(p: np.ndarray) -> float:
    """Return the mutual information between inputs and answers, in nats."""
    own, whole = (-(q * np.log(np.maximum(q, 1e-30))).sum(-1) for q in (p, p.mean(0)))
    return max(float(whole - own.mean()), LEAST)


def share_of(own: np.ndarray, base: np.ndarray) -> float:
    """Return what the expert counts beside the base."""
    one, two = (information(shares(each)) ** 2 for each in (own, base))
    return one / (one + two)


def aim_of(kind: str, own: np.ndarray, every: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return what a task's answers are held against, [inputs, classes]."""
    expert, below, ensemble = shares(own), shares(base), shares(every.mean(0))
    if kind.startswith("anchored"):
        share = share_of(own, base)
        return share * expert + (1 - share) * below
    if kind == "expert and base, halves":
        return (expert + below) / 2
    return {"expert": expert, "ensemble": ensemble}.get(kind, (expert + ensemble) / 2)


def losses(of: Any, kind: str, said: list[np.ndarray], inputs: str, part: slice) -> np.ndarray:
    """Return what `mergewell tune` is led by, [candidates, tasks, inputs]."""
    found: list[np.ndarray] = []
    counts: list[float] = []
    for j, all_said in enumerate(said):
        every = np.stack([of[f"expert{k}.{inputs}.{j}"][part] for k in range(len(said))])
        aim = aim_of(kind, every[j], every, of[f"base.{inputs}.{j}"][part])
        rows = all_said[:, part]
        lost = (aim * (np.log(aim + 1e-12) - np.log(shares(rows) + 1e-12))).sum(-1)
        if kind == "answers":
            lost += rows.argmax(-1) != every[j].argmax(-1)
        base = of[f"base.{inputs}.{j}"][part]
        counts.append(share_of(every[j], base) if kind == "anchored" else 1.0)
        found.append(lost)
    weights = np.array(counts) / np.mean(counts)
    return np.stack(found, 1) * weights[:, None]


def chosen(lost: np.ndarray, tried: list[Any], patience: int | None) -> tuple[int, int]:
    """Return the candidate that is chosen, and how many were judged."""
    order = [tried.index(candidate) for candidate in by_merge(tried)]
    methods = {candidate.method for candidate in tried}
    for count in range(1, len(order) + 1):
        some = order[:count]
        complete = {tried[m].method for m in some} == methods
        if patience is not None and complete and no_gain([tuple(lost[m]) for m in some], patience):
            break
    else:
        some = order
    return min(some, key=lambda m: lost[m].mean()), len(some)


def rows_of(family: str, path: Path) -> list[dict[str, Any]]:
    """Return a row an objective, kind and number of inputs of one captured set."""
    with np.load(path) as file:
        of = {name: file[name] for name in file.files}
    number, tasks = int(path.stem), len(of["tasks"])
    tried = capture.tried(family, number)
    right = [[of[f"{m}.right.{j}"] for j in range(tasks)] for m in range(len(tried))]
    whole = 100 * np.mean([[r.mean() for r in row] for row in right], 1)
    halves = [
        100 * np.mean([[r[start::2].mean() for r in row] for row in right], 1) for start in (0, 1)
    ]
    fair = (halves[1][halves[0].argmax()] + halves[0][halves[1].argmax()]) / 2
    plain = [tried.index(capture.Candidate("average", {}, None)), tried.index(capture.DEFAULT)]
    developed = number % 2 == 1 if family == "small_cnn" else number in LOOKED.get(family, ())
    found: list[dict[str, Any]] = []
    for inputs, count in INPUTS:
        if f"base.{inputs}.0" not in of:
            continue
        said = [
            np.stack([of[f"{m}.{inputs}.{j}"] for m in range(len(tried))]) for j in range(tasks)
        ]
        for objective in OBJECTIVES:
            kind, _, patience = objective.partition(", patience ")
            picked = [
                chosen(
                    losses(of, kind, said, inputs, slice(start, start + count)), tried,
                    int(patience) if patience else None,
                )
                for start in range(0, capture.INPUTS, count)
            ]  # fmt: skip
            found.append(
                {
                    "set": number, "held_out": not developed, "experts": list(of["experts"]),
                    "objective": objective, "inputs": count, "kind": inputs,
                    "choice": tried[picked[0][0]].choice,
                    "accuracy": [whole[best] for best, _ in picked],
                    "judged": float(np.mean([some for _, some in picked])) / len(tried),
                    "oracle": whole.max(), "oracle_fair": fair,
                    "average": whole[plain[0]], "task_arithmetic": whole[plain[1]],
                    "own": 100 * float(np.mean([of[f"expert{j}.right.{j}"] .mean()
                                                for j in range(tasks)])),
                    "base": 100 * float(np.mean([of[f"base.right.{j}"].mean()
                                                 for j in range(tasks)])),
                }
            )  # fmt: skip
    return found


def told(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> dict[str, float]:
    """Return a mean over sets with its 95 % interval: experts and sets are redrawn together.

    A draw gives each set an exponential weight times the mean weight of its experts, since sets
    share experts.
    """
    names = sorted({name for row in rows for name in row["experts"]})
    members = np.array([[name in row["experts"] for name in names] for row in rows], float)
    members /= members.sum(1, keepdims=True)
    values = np.array([value(row) for row in rows])
    rng = np.random.default_rng(79)
    weights = rng.exponential(size=(2000, len(rows)))
    weights *= rng.exponential(size=(2000, len(names))) @ members.T
    low, high = np.quantile((weights @ values) / weights.sum(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is said of one objective with some inputs."""

    def plain(row: dict[str, Any]) -> float:
        return max(row["average"], row["task_arithmetic"])

    def accuracy(row: dict[str, Any]) -> float:
        return float(np.mean(row["accuracy"]))

    def below(row: dict[str, Any]) -> float:
        return float(np.mean([one < plain(row) - 0.5 for one in row["accuracy"]]))

    return {
        "sets": len(rows),
        "regret": told(rows, lambda row: row["oracle"] - accuracy(row)),
        "regret_fair": told(rows, lambda row: row["oracle_fair"] - accuracy(row)),
        "above_plain": told(rows, lambda row: accuracy(row) - plain(row)),
        "below_plain": told(rows, below),
        "judged": float(np.mean([row["judged"] for row in rows])),
    }


def study_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is said of some sets of a family."""
    found: dict[str, Any] = {}
    for objective in OBJECTIVES:
        for inputs, count in INPUTS:
            named = (objective, inputs, count)
            some = [r for r in rows if (r["objective"], r["kind"], r["inputs"]) == named]
            if some:
                found.setdefault(objective, {})[f"{inputs} {count}"] = summary(some)
    once = [r for r in rows if (r["objective"], r["kind"], r["inputs"]) == (SHIPPED, "fresh", 16)]
    names = ("average", "task_arithmetic", "oracle_fair", "base", "own")
    regret = {n: told(once, lambda row, n=n: row["oracle"] - row[n]) for n in names}
    return {"sets": len(once), "regret_of": regret, "objectives": found}


def main() -> None:
    """Judge every objective on every set that is there."""
    study: dict[str, Any] = {"version": 2, "budget": capture.BUDGET, "methods": capture.METHODS}
    OUT.mkdir(exist_ok=True)
    for family in FAMILIES:
        folder = capture.captured(cache_folder(), family)
        paths = sorted(folder.glob("*.npz"), key=lambda path: int(path.stem))
        rows = [row for path in paths for row in rows_of(family, path)]
        if not rows:
            continue
        lines = "".join(json.dumps(rounded(row), default=str) + "\n" for row in rows)
        (OUT / f"{family}.jsonl").write_text(lines, encoding="utf-8")
        study[family] = {}
        for part, held in (("held_out", True), ("developed_on", False)):
            some = [row for row in rows if row["held_out"] == held]
            if some:
                study[family][part] = study_of(some)
                show(f"{family}, {part}", study[family][part])
    STUDY.write_text(json.dumps(rounded(study), indent=1) + "\n", encoding="utf-8")


def show(title: str, study: dict[str, Any]) -> None:
    """Print the rows of a table."""
    print(title, study["sets"], "sets", json.dumps(rounded(study["regret_of"])))
    for name, by_inputs in study["objectives"].items():
        for inputs, s in by_inputs.items():
            cells = [
                f"{s[k]['mean']:.2f} ({s[k]['low']:.2f} to {s[k]['high']:.2f})"
                for k in ("regret", "regret_fair", "above_plain", "below_plain")
            ]
            print(f"| {name} | {inputs} | {' | '.join(cells)} | {s['judged']:.2f}")


if __name__ == "__main__":
    main()
