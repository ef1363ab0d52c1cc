"""How much accuracy a choice without labels costs, from what `capture.py` captured.

    python benchmarks/tune/regret.py [--family small_cnn]

Writes benchmarks/tune/results/FAMILY.jsonl (a row a set, objective and number of inputs) and
docs/studies/tuning.json. Odd sets are those that the objective was developed on; what is claimed
is claimed of the even ones, of other tasks. Regret: accuracy of the candidate that is best on the
tests minus that of the chosen one. That best one is chosen on the tests it is judged by; `fair` is
against the candidate that is best on one half of the tests, judged on the other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import capture
import numpy as np
from book import rounded
from run import cache_folder

OUT = Path(__file__).parent / "results"
STUDY = Path(__file__).parents[2] / "docs/studies/tuning.json"
OBJECTIVES = (
    "expert", "ensemble", "mix", "answers", "expert's answers alone", "mix, guarded",
    "answers, guarded",
)  # fmt: skip
GUARD = 1.0
"""Standard errors by which a guarded choice must be better than average and task arithmetic."""


def shares(logits: np.ndarray) -> np.ndarray:
    """Return probabilities."""
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def losses(of: Any, kind: str, tasks: int, tried: int, count: int) -> np.ndarray:
    """Return what `mergewell tune` is led by, [candidates, tasks, inputs]."""
    found = np.zeros((tried, tasks, count))
    for j in range(tasks):
        own = of[f"expert.{j}.{j}"][:count]
        every = shares(np.mean([of[f"expert.{k}.{j}"][:count] for k in range(tasks)], 0))
        aim = {"expert": shares(own), "ensemble": every}.get(kind, (shares(own) + every) / 2)
        for m in range(tried):
            said = of[f"said.{m}.{j}"][:count]
            if kind != "expert's answers alone":
                logs = np.log(shares(said) + 1e-12)
                found[m, j] = (aim * (np.log(aim + 1e-12) - logs)).sum(-1)
            if "answers" in kind:
                found[m, j] += said.argmax(-1) != own.argmax(-1)
    return found


def chosen(lost: np.ndarray, plain: list[int], guarded: bool) -> int:
    """Return the candidate that is chosen; guarded, only where clearly better than plain ones."""
    means = lost.mean((1, 2))
    best, safe = int(means.argmin()), min(plain, key=lambda m: means[m])
    gain = lost[safe] - lost[best]
    error = np.sqrt((gain.var(-1) / gain.shape[-1]).sum()) / len(gain)
    return safe if guarded and gain.mean() <= GUARD * error else best


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return a row an objective and number of inputs of one captured set."""
    with np.load(path) as file:
        of = {name: file[name] for name in file.files}
    number, tasks = int(path.stem), len(of["tasks"])
    tried = capture.tried(number)
    right = [[of[f"right.{m}.{j}"] for j in range(tasks)] for m in range(len(tried))]
    whole = 100 * np.mean([[r.mean() for r in row] for row in right], 1)
    halves = [
        100 * np.mean([[r[start::2].mean() for r in row] for row in right], 1) for start in (0, 1)
    ]
    fair = (halves[1][halves[0].argmax()] + halves[0][halves[1].argmax()]) / 2
    plain = [tried.index(capture.Candidate("average", {}, None)), tried.index(capture.DEFAULT)]
    found: list[dict[str, Any]] = []
    for objective in OBJECTIVES:
        kind, _, guarded = objective.partition(", ")
        for count in (16, 64):
            best = chosen(losses(of, kind, tasks, len(tried), count), plain, bool(guarded))
            found.append(
                {
                    "set": number, "held_out": number % 2 == 0, "experts": list(of["experts"]),
                    "objective": objective, "inputs": count, "choice": tried[best].choice,
                    "accuracy": whole[best], "oracle": whole.max(), "oracle_fair": fair,
                    "average": whole[plain[0]], "task_arithmetic": whole[plain[1]],
                    "own": 100 * float(np.mean([of[f"own.{j}"].mean() for j in range(tasks)])),
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

    return {
        "sets": len(rows),
        "regret": told(rows, lambda row: row["oracle"] - row["accuracy"]),
        "regret_fair": told(rows, lambda row: row["oracle_fair"] - row["accuracy"]),
        "above_plain": told(rows, lambda row: row["accuracy"] - plain(row)),
        "below_plain": told(rows, lambda row: float(row["accuracy"] < plain(row) - 0.5)),
        "accuracy": told(rows, lambda row: row["accuracy"]),
    }


def main() -> None:
    """Judge every objective on every set that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="small_cnn")
    given = parser.parse_args()
    folder = cache_folder().parent / "tune" / given.family
    paths = sorted(folder.glob("*.npz"), key=lambda path: int(path.stem))
    rows = [row for path in paths for row in rows_of(path)]
    OUT.mkdir(exist_ok=True)
    lines = "".join(json.dumps(rounded({**row, "experts": row["experts"]}), default=str) + "\n"
                    for row in rows)  # fmt: skip
    (OUT / f"{given.family}.jsonl").write_text(lines, encoding="utf-8")
    study: dict[str, Any] = {"version": 1, "family": given.family, "budget": capture.BUDGET,
                             "methods": capture.METHODS}  # fmt: skip
    for part, held in (("held_out", True), ("developed_on", False)):
        some = [row for row in rows if row["held_out"] == held]
        once = [r for r in some if (r["objective"], r["inputs"]) == (OBJECTIVES[0], 16)]
        base = {
            name: told(once, lambda row, name=name: row["oracle"] - row[name])
            for name in ("average", "task_arithmetic", "oracle_fair")
        }
        study[part] = {"regret_of": base, "objectives": {
            objective: {
                str(count): summary(
                    [r for r in some if (r["objective"], r["inputs"]) == (objective, count)]
                )
                for count in (16, 64)
            }
            for objective in OBJECTIVES
        }}  # fmt: skip
        print(part, len(once), rounded(base))
        for name, by_count in study[part]["objectives"].items():
            for count, s in by_count.items():
                cells = [
                    f"{s[k]['mean']:.2f} ({s[k]['low']:.2f} to {s[k]['high']:.2f})"
                    for k in ("regret", "regret_fair", "above_plain", "below_plain")
                ]
                print(f"| {name} | {count} | {' | '.join(cells)} |")
    STUDY.write_text(json.dumps(rounded(study), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
