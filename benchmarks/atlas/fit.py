"""Fits the predictor that `mergewell check` ships, and says how good it is on what it never saw.

    python benchmarks/atlas/fit.py [--families F ...] [--study] [--bases]

Writes src/mergewell/prediction/data/BUDGET.safetensors; with --study docs/studies/prediction.json,
from which `prediction.py` makes the page. Held out is one task at a time, with every merge that it
is part of: each number is predicted by trees that saw neither the task nor the merge. Intervals are
conformal: quantiles of what the predictions of the other tasks were off by.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trees
from evidence import FEATURES, Evidence
from table import RESULTS, spearman

from mergewell.prediction.forest import Forest
from mergewell.prediction.predictor import LEAST, LEVEL, Budget, Predictor, size_class

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "docs/studies"
DATA = ROOT / "src/mergewell/prediction/data"
ALARMS: dict[str, tuple[int, float]] = {
    "w_base": (-1, 0.015), "w_norm": (1, 0.015), "u_kl_base_own": (1, 0.015),
}  # fmt: skip
"""By feature on which side an expert is called unfit, and of how many compatible sets: together
under the 5 % that are promised, since thresholds are estimated."""

SHOWN = 400
"""Merges of the atlas that a report draws."""

MONOTONE = {
    "u_held_ensemble": trees.RISING, "u_agreement_ensemble": trees.RISING,
    "u_kl_ensemble": trees.FALLING, "l_right": trees.RISING, "l_loss_rise": trees.FALLING,
}  # fmt: skip
"""Nearer to the ensemble's or the right answers is not worse."""

RETENTION: dict[str, Any] = {"trees": 600, "rate": 0.02, "share": 0.3, "leaves": 12, "leaf": 20}
SPREAD: dict[str, Any] = {"trees": 120, "rate": 0.05, "leaves": 6, "leaf": 60}


@dataclass(frozen=True)
class HeldOut:
    """What was predicted of rows that the trees never saw."""

    value: np.ndarray
    width: np.ndarray


Folds = Iterator[tuple[np.ndarray, np.ndarray]]


def tasks_out(of: Evidence) -> Folds:
    """Yield (rows fitted, rows predicted): a task out, and all merges that it is part of."""
    for task in np.unique(of.task):
        yield ~of.holds(task), of.task == task


def bases_out(of: Evidence) -> Folds:
    """Yield the same with a family out: another architecture and other data."""
    families = np.array([row["family"] for row in of.numbers])
    for family in np.unique(families):
        yield families != family, families == family


def methods_out(of: Evidence) -> Folds:
    """Yield the same with a merge method out."""
    methods = np.array([row["method"] for row in of.numbers])
    for method in np.unique(methods):
        yield methods != method, methods == method


def held_out(of: Evidence, features: Sequence[str], folds: Callable[[Evidence], Folds]) -> HeldOut:
    """Return predictions of rows that were held out; widths from the other folds' residuals."""
    rows, aim = of.rows(features), of.retention
    value, width = (np.full(len(of), np.nan) for _ in range(2))
    for fitted, asked in folds(of):
        forest = fit_retention(rows[fitted], aim[fitted], features)
        value[asked] = forest(rows[asked]).clip(0, 1.5)
    wide = np.column_stack([rows, value])
    off = np.abs(aim - value)
    for fitted, asked in folds(of):
        known = fitted & np.isfinite(value)
        forest = fit_spread(wide[known], off[known], features)
        width[asked] = forest(wide[asked]).clip(LEAST)
    return HeldOut(value, width)


def fit_retention(rows: np.ndarray, aim: np.ndarray, features: Sequence[str]) -> Forest:
    """Return trees for retention."""
    return trees.fit(rows, aim, features, monotone=MONOTONE, **RETENTION)


def fit_spread(rows: np.ndarray, off: np.ndarray, features: Sequence[str]) -> Forest:
    """Return trees for how far predictions are off; the prediction is the last feature."""
    return trees.fit(rows, off, [*features, "value"], **SPREAD)


def quantiles(of: Evidence, found: HeldOut, among: np.ndarray) -> dict[str, tuple[float, float]]:
    """Return low and high ends of intervals in widths, for an expert and for means, [low, high]."""
    edges = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    scaled = (of.retention - found.value) / found.width
    ends: dict[str, tuple[float, float]] = {"expert": _ends(scaled[among], edges)}
    off, width = of.means(of.retention - found.value), of.means(found.width)
    sizes = np.array([size_class(int(k)) for k in of.first(of.column("w_experts"))])
    inside = of.first(among.astype(float)) > 0
    for name in np.unique(sizes):
        ends[str(name)] = _ends((off / width)[(sizes == name) & inside], edges)
    return ends


def _ends(values: np.ndarray, edges: tuple[float, float]) -> tuple[float, float]:
    return tuple(float(q) for q in np.quantile(values[np.isfinite(values)], edges))  # type: ignore


def covered(of: Evidence, found: HeldOut) -> dict[str, float]:
    """Return how many intervals held the measured value; each task's from the other tasks' errors.

    The interval of a mean is made from merges of other sets: odd ones from even ones and the other
    way round.
    """
    scaled = (of.retention - found.value) / found.width
    each = np.zeros(len(of), bool)
    for task in np.unique(of.task):
        asked = of.task == task
        low, high = quantiles(of, found, ~of.holds(task))["expert"]
        each[asked] = (scaled[asked] >= low) & (scaled[asked] <= high)
    off = of.means(of.retention - found.value) / of.means(found.width)
    sizes = np.array([size_class(int(k)) for k in of.first(of.column("w_experts"))])
    odd = of.first(of.set_.astype(float)) % 2 == 1
    mean = np.zeros(len(off), bool)
    for half in (odd, ~odd):
        ends = quantiles(of, found, np.isin(of.merge, np.flatnonzero(~half)))
        for name in np.unique(sizes):
            asked = half & (sizes == name)
            low, high = ends[str(name)]
            mean[asked] = (off[asked] >= low) & (off[asked] <= high)
    return {"expert": float(each.mean()), "mean": float(mean.mean())}


def thresholds(of: Evidence, features: Sequence[str], among: np.ndarray) -> dict[str, Any]:
    """Return for each feature of an alarm (sign, end): few compatible sets `among` go beyond."""
    fine = (of.first(of.compatible.astype(float)) > 0) & among
    return {
        name: (sign, sign * float(np.quantile(_worst(of, sign * of.column(name))[fine], 1 - share)))
        for name, (sign, share) in ALARMS.items()
        if name in features
    }


def alarms(of: Evidence, features: Sequence[str]) -> dict[str, Any]:
    """Return false alarms and detections by reason; a set's thresholds are from the other half."""
    fine = of.first(of.compatible.astype(float)) > 0
    odd = of.first(of.set_.astype(float)) % 2 == 1
    called = np.zeros(len(fine), bool)
    for half in (odd, ~odd):
        for name, (sign, end) in thresholds(of, features, ~half).items():
            called |= half & (_worst(of, sign * of.column(name)) > sign * end)
    reasons = of.first(np.array([row.get("reason") or "" for row in of.numbers]))
    found = {
        str(r): {"share": float(called[reasons == r].mean()), "merges": int((reasons == r).sum())}
        for r in np.unique(reasons)
        if r
    }
    return {"false_alarms": float(called[fine].mean()), "found": found}


def _worst(of: Evidence, values: np.ndarray) -> np.ndarray:
    worst = np.full(of.merge.max() + 1, -np.inf)
    np.maximum.at(worst, of.merge, values)
    return worst


def agreement(of: Evidence, value: np.ndarray, among: np.ndarray | None = None) -> dict[str, Any]:
    """Return rank correlations of predicted and measured retention, with intervals over sets."""
    among = np.ones(len(of), bool) if among is None else among
    seen = np.isfinite(value) & among
    whole = np.unique(of.merge[~seen])
    ours, true = of.means(np.nan_to_num(value)), of.means(of.retention)
    kept = ~np.isin(np.arange(len(ours)), whole)
    sets = of.first(of.set_.astype(float))
    return {
        "merge": spearman(ours[kept], true[kept]),
        "merge_interval": _resampled(ours[kept], true[kept], sets[kept]),
        "expert": spearman(value[seen], of.retention[seen]),
        "off_mean": float(np.abs(ours - true)[kept].mean()),
        "off_expert": float(np.abs(value - of.retention)[seen].mean()),
        "merges": int(kept.sum()),
    }


def _resampled(one: np.ndarray, other: np.ndarray, sets: np.ndarray) -> list[float]:
    rng = np.random.default_rng(0)
    names, place = np.unique(sets, return_inverse=True)
    members = [np.flatnonzero(place == i) for i in range(len(names))]
    found = []
    for _ in range(200):
        picked = np.concatenate([members[i] for i in rng.integers(0, len(names), len(names))])
        found.append(spearman(one[picked], other[picked]))
    return [float(q) for q in np.quantile(found, (0.025, 0.975))]


def ship(of: Evidence, budget: Budget, found: HeldOut, facts: dict[str, Any]) -> Predictor:
    """Return the predictor fitted to everything, with intervals from what was held out."""
    features = FEATURES[budget]
    rows = of.rows(features)
    wide = np.column_stack([rows, found.value])
    with np.errstate(all="ignore"):
        least, most = np.nanmin(rows, 0), np.nanmax(rows, 0)
    return Predictor(
        budget, tuple(features),
        fit_retention(rows, of.retention, features),
        fit_spread(wide, np.abs(of.retention - found.value), features),
        least, most,
        {"quantiles": quantiles(of, found, np.ones(len(of), bool)), **facts},
    )  # fmt: skip


def main() -> None:
    """Fit, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+")
    parser.add_argument("--study", action="store_true", help="hold out families and methods too")
    given = parser.parse_args()
    families = given.families or sorted(p.name.split(".")[1] for p in RESULTS.glob("merges.*"))
    of = Evidence.of(families)
    size = {
        "merges": int(of.merge.max()) + 1, "rows": len(of), "families": families,
        "experts": len({(r["family"], r["expert"]) for r in of.numbers}),
        "bases": len({(r["family"], r["base"]) for r in of.numbers}),
        "tasks": len(np.unique(of.task)), "methods": len({r["method"] for r in of.numbers}),
    }  # fmt: skip
    print(size)
    budgets: dict[str, Any] = {}
    DATA.mkdir(exist_ok=True)
    for budget, features in FEATURES.items():
        found = held_out(of, features, tasks_out)
        told = {
            "tasks_out": agreement(of, found.value),
            "compatible": agreement(of, found.value, of.compatible),
            "by_family": by_family(of, found.value),
            "coverage": covered(of, found),
            "alarms": alarms(of, features),
        }
        if given.study:
            told["methods_out"] = agreement(of, held_out(of, features, methods_out).value)
            if len(families) > 1:
                other = held_out(of, features, bases_out)
                told["bases_out"] = {"by_family": by_family(of, other.value)}
            told["points"] = points(of, found)
        budgets[budget] = told
        print(budget, json.dumps({k: v for k, v in told.items() if k != "points"}, default=float))
        shown = np.random.default_rng(0).permutation([p[1:] for p in points(of, found)])[:SHOWN]
        ends = thresholds(of, features, np.ones(of.merge.max() + 1, bool))
        facts = {**size, "alarms": ends, "points": shown.tolist()}
        path = DATA / f"{budget}.safetensors"
        path.write_bytes(ship(of, budget, found, facts).to_bytes())  # type: ignore[arg-type]
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    if given.study:
        write_study(of, size, budgets)


def write_study(of: Evidence, size: dict[str, Any], budgets: dict[str, Any]) -> None:
    """Write docs/studies/prediction.json."""
    study = {
        "version": 1, **size,
        "spearman": {name: told["tasks_out"]["merge"] for name, told in budgets.items()},
        "coverage90": {name: told["coverage"]["mean"] for name, told in budgets.items()},
        "false_alarms": {n: told["alarms"]["false_alarms"] for n, told in budgets.items()},
        "single": single(of), "gradients": gradients(of), "budgets": budgets,
    }  # fmt: skip
    text = json.dumps(study, default=float)
    (STUDIES / "prediction.json").write_text(text + "\n")


def by_family(of: Evidence, value: np.ndarray) -> dict[str, Any]:
    """Return the agreement within each family."""
    families = np.array([row["family"] for row in of.numbers])
    return {str(f): agreement(of, value, families == f) for f in np.unique(families)}


def single(of: Evidence) -> dict[str, float]:
    """Return every single predictor's rank correlation with the mean retention of merges."""
    true = of.means(of.retention)
    names = sorted({k for row in of.numbers for k in row if k[:2] in ("w_", "u_", "l_")})
    found: dict[str, float] = {}
    for name in names:
        value = of.column(name)
        mean = of.means(np.nan_to_num(value))
        whole = of.means(np.isfinite(value).astype(float)) == 1
        if whole.sum() > 200 and mean[whole].std() > 0:
            found[name] = spearman(mean[whole], true[whole])
    return dict(sorted(found.items(), key=lambda one: -abs(one[1])))


def gradients(of: Evidence) -> dict[str, Any]:
    """Return what a forest on the labelled gradients of arXiv:2601.22285 reaches, tasks out."""
    names = sorted({k for row in of.numbers for k in row if k.startswith("l_") and "gradient" in k})
    there = np.isfinite(of.column(names[0])) if names else np.zeros(len(of), bool)
    part = Evidence([row for row, held in zip(of.numbers, there, strict=True) if held])
    found = {
        title: agreement(part, held_out(part, features, tasks_out).value)
        for title, features in (("gradients", names), ("weights and gradients",
            (*FEATURES["weights"], *names)))
    }  # fmt: skip
    ours = {b: agreement(part, held_out(part, f, tasks_out).value) for b, f in FEATURES.items()}
    return {"features": len(names), **found, **ours}


def points(of: Evidence, found: HeldOut) -> list[list[Any]]:
    """Return each merge's family, and its predicted and measured mean retention, rounded."""
    ours, true = of.means(found.value), of.means(of.retention)
    families = of.first(np.array([row["family"] for row in of.numbers]))
    return [
        [str(f), round(float(x), 3), round(float(y), 3)]
        for f, x, y in zip(families, ours, true, strict=True)
    ]


if __name__ == "__main__":
    main()
