"""Tests the sign of every recommendation of `mergewell advise` on the atlas.

    python benchmarks/atlas/advice.py [--families F ...] [--draws N]

Reads results/*.csv.gz alone (about a minute); writes docs/studies/advice.{json,md,svg} and
src/mergewell/advise/atlas.json, the measured effects that the command quotes.

A row is an expert of a merge of which nothing was broken on purpose. Its retention is regressed on
its own settings, the mean settings of the experts that it was merged with, and the number of
experts, within base, task, method and the method's scale. The effect of a knob is that of turning
it in all experts: own + others. Intervals: rows are reweighted by set and by fine-tuning run at
once (each draw an exponential weight a set times one a run), 95 %.

Shapes: R rows, F columns.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from book import rounded
from table import known, spearman

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "docs/studies"
SHIPPED = ROOT / "src/mergewell/advise/atlas.json"
FAMILIES = ("small_cnn", "efficientnet", "minilm")
TOP = 1.5
"""Retention is cut here, as where the predictor is fitted."""

ALL = {
    "small_cnn": {
        "usps": 7275, "notmnist": 7984, "kannada": 7984, "sign_digits": 1634, "gtsrb_low": 5425,
        "gtsrb_high": 2543, "kannada_turned": 7984,
    },
    "efficientnet": {
        "usps": 7275, "notmnist": 7984, "kannada": 7984, "gtsrb": 7984, "sign_digits": 1634,
    },
    "minilm": {
        "sst2": 6904, "trec": 5436, "agnews": 5984, "banking77": 9987, "tweet_emotion": 3241,
        "subj": 8984, "snips": 13068, "sms_spam": 4486, "clinc150": 14984,
        "tweet_sentiment": 11268, "tweet_offensive": 11900,
    },
}  # fmt: skip
"""Training examples of tasks where a run took all; 9984 where none is given."""

PREDICTED = {
    "learning_rate": -1, "steps": -1, "batch_size": 1, "samples": 1, "weight_decay": 1,
    "label_noise": -1, "experts": -1, "spread_of_rates": -1, "spread_of_steps": -1,
    "distance": -1, "late": -1,
}  # fmt: skip
"""By knob the sign of its effect on retention that the bound gives (papers.md 4.2 and 4.4)."""

KNOBS = ("learning_rate", "steps", "batch_size", "samples", "weight_decay", "label_noise")
BESIDE = ("sgd", "stopped")
"""Adjusted for and not asked about: the optimiser, and a rate that had not fallen to 0 yet."""

WHOLE = ("experts", "spread_of_rates", "spread_of_steps")
GROUPS = {
    "averaging": ("average", "task_arithmetic", "slerp", "model_stock", "regmean", "bmm"),
    "sparsifying": ("ties", "dare", "breadcrumbs", "della", "pcb", "sce", "magmax"),
    "spectral": ("tsv", "iso_c", "iso_cts"),
}
FEWEST = 4
"""Runs that must differ in a setting for it to be asked about."""


@dataclass(frozen=True)
class Rows:
    """Experts of sound merges of one family, with what each was made with."""

    family: str
    rows: Sequence[dict[str, Any]]
    experts: Mapping[str, dict[str, Any]]

    @classmethod
    def of(cls, family: str) -> Rows:
        """Return what the tables hold of a family."""
        experts = {row["expert"]: row for row in known("experts", family)}
        key = ("base", "set", "merge")
        merges = {tuple(r[k] for k in key): r for r in known("merges", family)}
        found: list[dict[str, Any]] = []
        for row in known("tasks", family):
            merge = merges[tuple(row[k] for k in key)]
            names = merge["experts"]
            sound = all(n in experts and experts[n]["kind"] in ("trained", "given") for n in names)
            if merge.get("reason") or not sound:
                continue
            scale = merge["parameters"].get("scale", merge["parameters"].get("t", ""))
            found.append(row | {"experts": names, "way": f"{merge['method']} {scale}"})
        return cls(family, found, experts)

    def only(self, kept: Callable[[dict[str, Any]], bool]) -> Rows:
        """Return some of the rows."""
        return Rows(self.family, [row for row in self.rows if kept(row)], self.experts)

    @cached_property
    def settings(self) -> dict[str, dict[str, float]]:
        """What each expert was made with: doublings, shares and yes or no, by expert and knob."""
        trained = [e for e in self.experts.values() if e["kind"] in ("trained", "given")]
        middle = {
            o: np.median([np.log2(e["rate"]) for e in trained if e["optimiser"] == o])
            for o in {e["optimiser"] for e in trained}
        }
        every = ALL.get(self.family, {})
        return {
            e["expert"]: {
                "learning_rate": np.log2(e["rate"]) - middle[e["optimiser"]],
                "steps": np.log2(e["step"]),
                "batch_size": np.log2(e["batch"]),
                "samples": np.log2(e["samples"] or every.get(e["task"], 9984)),
                "weight_decay": float(e["decay"] >= 0.01),
                "label_noise": float(e["noise"] > 0),
                "sgd": float(e["optimiser"] == "sgd"),
                "stopped": float(e["step"] < e["steps"]),
                "distance": np.log2(max(e["relative_norm"], 1e-9)),
            }
            for e in trained
        }

    @cached_property
    def run(self) -> np.ndarray:
        """Which fine-tuning a row's expert is a checkpoint of, [R]."""
        return np.array([self.run_of(row["expert"]) for row in self.rows])

    def run_of(self, expert: str) -> str:
        """Return the run that an expert is a checkpoint of."""
        row = self.experts[expert]
        return expert if row["kind"] == "given" else f"{row['base']}.{row['number']}"

    @cached_property
    def set_(self) -> np.ndarray:
        """Which set of experts a row is of, [R]."""
        return np.array([f"{row['base']}.{row['set']}" for row in self.rows])

    @cached_property
    def merges(self) -> int:
        """How many merges the rows are of."""
        return len({(row["base"], row["set"], row["merge"]) for row in self.rows})

    def outcomes(self) -> np.ndarray:
        """Return retention and merged accuracy in points, [R, 2]."""
        pairs = np.array([(row["merged"], row["own"]) for row in self.rows], float)
        kept = np.clip(pairs[:, 0] / np.maximum(pairs[:, 1], 1e-9), 0, TOP)
        return 100 * np.stack([kept, pairs[:, 0]], 1)

    def own(self, knob: str) -> np.ndarray:
        """Return a setting of each row's expert, [R]."""
        return np.array([self.settings[row["expert"]][knob] for row in self.rows])

    def others(self, knob: str) -> np.ndarray:
        """Return the mean of a setting over the experts merged with each row's, [R]."""
        return np.array(
            [
                np.mean([self.settings[n][knob] for p, n in enumerate(row["experts"])
                         if p != row["place"]] or [0.0])
                for row in self.rows
            ]
        )  # fmt: skip

    def spread(self, knob: str) -> np.ndarray:
        """Return the standard deviation of a setting over each merge's experts, [R]."""
        return np.array([np.std([self.settings[n][knob] for n in r["experts"]]) for r in self.rows])

    def varies(self, knob: str) -> bool:
        """Return whether enough runs differ in a setting."""
        runs = dict(zip(self.run, self.own(knob), strict=True))
        counts = Counter(runs.values()).most_common()
        return sum(n for _, n in counts[1:]) >= FEWEST

    def within(self, *, runs: bool = False) -> np.ndarray:
        """Return what rows are compared within, as dummies [R, F]: base and task, way to merge."""
        places = self.run if runs else [f"{r['base']} {r['task']}" for r in self.rows]
        return np.concatenate([dummies(places), dummies([r["way"] for r in self.rows])[:, 1:]], 1)


def dummies(labels: Sequence[str] | np.ndarray) -> np.ndarray:
    """Return a column a label, [R, F]."""
    names, found = np.unique(np.asarray(labels), return_inverse=True)
    return np.eye(len(names))[found]


@dataclass(frozen=True)
class Fit:
    """Coefficients of the columns asked about, and of every draw: [F, O] and [draws, F, O]."""

    at: np.ndarray
    draws: np.ndarray

    def told(self, *places: int, outcome: int = 0) -> dict[str, float]:
        """Return the sum of some columns' effects, with its 95 % interval."""
        value = self.at[list(places), outcome].sum()
        low, high = np.quantile(self.draws[:, list(places), outcome].sum(1), [0.025, 0.975])
        return {"effect": float(value), "low": float(low), "high": float(high)}


def fit(rows: Rows, asked: np.ndarray, within: np.ndarray, *, draws: int) -> Fit:
    """Return the least squares of both outcomes on columns [R, F], within others."""
    x, y = np.concatenate([asked, within], 1), rows.outcomes()
    scale = np.maximum(np.abs(x).max(0), 1e-9)
    x = x / scale
    _, sets = np.unique(rows.set_, return_inverse=True)
    _, runs = np.unique(rows.run, return_inverse=True)
    rng = np.random.default_rng(61)

    def solved(weights: np.ndarray) -> np.ndarray:
        left = x.T @ (x * weights[:, None])
        left[np.diag_indices_from(left)] += 1e-7 * len(x)  # way and task may lie in one another
        found = np.linalg.solve(left, x.T @ (y * weights[:, None])) / scale[:, None]
        return found[: asked.shape[1]]

    drawn: list[np.ndarray] = []
    for _ in range(draws):
        of_set, of_run = (rng.exponential(size=places.max() + 1) for places in (sets, runs))
        drawn.append(solved(of_set[sets] * of_run[runs]))
    return Fit(solved(np.ones(len(x))), np.stack(drawn))


def verdict(predicted: int, told: Mapping[str, float]) -> str:
    """Return whether an interval bears a sign out, contradicts it or leaves it open."""
    if told["low"] <= 0 <= told["high"]:
        return "open"
    return "agrees" if (told["effect"] > 0) == (predicted > 0) else "disagrees"


def settings_fit(rows: Rows, *, draws: int) -> dict[str, Any]:
    """Return the effect of every setting, own, others' and both, on both outcomes."""
    knobs = [k for k in KNOBS if rows.varies(k)]
    held = [*knobs, *(k for k in BESIDE if rows.varies(k))]
    columns = [part for k in held for part in (rows.own(k), rows.others(k))]
    columns += [
        np.log2([len(row["experts"]) for row in rows.rows]),
        rows.spread("learning_rate"), rows.spread("steps"),
    ]  # fmt: skip
    found = fit(rows, np.stack(columns, 1), rows.within(), draws=draws)
    effects: dict[str, Any] = {}
    for place, knob in enumerate(knobs):
        both = (2 * place, 2 * place + 1)
        effects[knob] = {
            "predicted": PREDICTED[knob], **found.told(*both),
            "own": found.told(both[0]), "others": found.told(both[1]),
            "merged_accuracy": found.told(*both, outcome=1),
        }  # fmt: skip
    for place, knob in enumerate(WHOLE, 2 * len(held)):
        effects[knob] = {
            "predicted": PREDICTED[knob], **found.told(place),
            "merged_accuracy": found.told(place, outcome=1),
        }  # fmt: skip
    return effects


def distance_fit(rows: Rows, *, draws: int) -> dict[str, Any]:
    """Return the effect of how far experts moved, alone and with its square (an optimum)."""
    own, others = rows.own("distance"), rows.others("distance")
    count = np.log2([len(row["experts"]) for row in rows.rows])
    found = fit(rows, np.stack([own, others, count], 1), rows.within(), draws=draws)
    whole = np.array(
        [np.mean([rows.settings[n]["distance"] for n in r["experts"]]) for r in rows.rows]
    )
    middle = whole.mean()
    bent = np.stack([whole - middle, (whole - middle) ** 2, count], 1)
    curve = fit(rows, bent, rows.within(), draws=draws)
    slope, bend = curve.at[0, 1], curve.at[1, 1]
    top = middle - slope / (2 * bend) if bend < 0 else None
    return {
        "distance": {
            "predicted": PREDICTED["distance"], **found.told(0, 1), "own": found.told(0),
            "others": found.told(1), "merged_accuracy": found.told(0, 1, outcome=1),
        },
        "optimum": {
            "predicted": -1, **curve.told(1, outcome=1),
            "at": None if top is None else float(2**top),
            "inside": bool(top is not None and whole.min() < top < whole.max()),
            "seen": [float(2 ** np.quantile(whole, q)) for q in (0.05, 0.95)],
        },
    }  # fmt: skip


def late_fit(rows: Rows, *, draws: int) -> dict[str, Any] | None:
    """Return what the end of a run does beside its earlier checkpoint, within runs."""
    stops: dict[str, set[int]] = {}
    for row in rows.rows:
        stops.setdefault(rows.run_of(row["expert"]), set()).add(rows.experts[row["expert"]]["step"])
    both = rows.only(lambda row: len(stops[rows.run_of(row["expert"])]) > 1)
    if len(set(both.run)) < 2 * FEWEST:
        return None
    late = 1 - both.own("stopped")
    beside = [both.others(k) for k in ("learning_rate", "steps", "batch_size", "samples")]
    beside.append(np.log2([len(row["experts"]) for row in both.rows]))
    found = fit(both, np.stack([late, *beside], 1), both.within(runs=True), draws=draws)
    return {
        "predicted": PREDICTED["late"], **found.told(0), "runs": len(set(both.run)),
        "merged_accuracy": found.told(0, outcome=1),
    }  # fmt: skip


def norms(rows: Rows, *, draws: int) -> dict[str, Any]:
    """Return by optimiser the powers of settings that the task vector's norm grows with."""
    found: dict[str, Any] = {}
    rng = np.random.default_rng(62)
    for optimiser in ("adamw", "sgd"):
        sound = [
            e for e in rows.experts.values()
            if e["kind"] == "trained" and e["optimiser"] == optimiser and e["noise"] == 0
        ]  # fmt: skip
        runs, place = np.unique([rows.run_of(e["expert"]) for e in sound], return_inverse=True)
        if len(runs) < 2 * FEWEST + 4:
            continue
        knobs = ("learning_rate", "steps", "batch_size", "samples", "stopped")
        x = np.array([[rows.settings[e["expert"]][k] for k in knobs] for e in sound])
        x = np.concatenate([x, dummies([e["base"] for e in sound])], 1)
        y = np.array([rows.settings[e["expert"]]["distance"] for e in sound])

        def solved(weights: np.ndarray, x: np.ndarray = x, y: np.ndarray = y) -> np.ndarray:
            root = np.sqrt(weights)
            return np.linalg.lstsq(x * root[:, None], y * root, rcond=None)[0]

        at = solved(np.ones(len(y)))
        drawn = np.stack([solved(rng.exponential(size=len(runs))[place]) for _ in range(draws)])
        ends = np.quantile(drawn, [0.025, 0.975], axis=0)
        found[optimiser] = {"runs": len(runs)} | {
            knob: {"effect": float(at[i]), "low": float(ends[0, i]), "high": float(ends[1, i])}
            for i, knob in enumerate(knobs[:4])
        }
    return found


def ranks(rows: Rows) -> dict[str, float]:
    """Return rank correlations with the mean retention of merges, of what advice is made from."""
    merges: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(rows.rows):
        merges.setdefault((row["base"], row["set"], row["merge"]), []).append(place)
    kept = rows.outcomes()[:, 0]
    retention = np.array([kept[places].mean() for places in merges.values()])
    of = [rows.rows[places[0]]["experts"] for places in merges.values()]

    def squared(knobs: Sequence[str]) -> np.ndarray:
        """Return the mean over experts of a squared length, times 1 - 1/N as if orthogonal."""
        lengths = [[sum(rows.settings[n][k] for k in knobs) for n in names] for names in of]
        return np.array([np.mean(4.0 ** np.array(v)) * (1 - 1 / len(v)) for v in lengths])

    return {
        "rate_times_steps": spearman(squared(("learning_rate", "steps")), retention),
        "distance": spearman(squared(("distance",)), retention),
        "experts": spearman(np.array([float(len(names)) for names in of]), retention),
    }


def study(family: str, draws: int) -> dict[str, Any] | None:
    """Return all that is measured on one family, or nothing where it has no sound merges."""
    rows = Rows.of(family)
    if rows.merges < 40:
        return None
    effects = settings_fit(rows, draws=draws)
    far = distance_fit(rows, draws=draws)
    effects["distance"] = far["distance"]
    late = late_fit(rows, draws=draws)
    if late is not None:
        effects["late"] = late
    for told in effects.values():
        told["verdict"] = verdict(told["predicted"], told)
    groups = {
        name: settings_fit(part, draws=draws)
        for name, methods in GROUPS.items()
        if (part := rows.only(lambda row, m=methods: row["method"] in m)).merges >= 80
    }
    return {
        "merges": rows.merges, "rows": len(rows.rows), "sets": len(set(rows.set_)),
        "runs": len(set(rows.run)), "effects": effects,
        "optimum": far["optimum"] | {"verdict": verdict(-1, far["optimum"])},
        "norms": norms(rows, draws=draws), "ranks": ranks(rows),
        "groups": {
            name: {k: {e: told[e] for e in ("effect", "low", "high")} for k, told in found.items()}
            for name, found in groups.items()
        },
    }  # fmt: skip


def overall(verdicts: Sequence[str]) -> str:
    """Return what families say together of one prediction."""
    said = set(verdicts) - {"open"}
    return "mixed" if len(said) > 1 else said.pop() if said else "open"


def main() -> None:
    """Measure, and write figures, page, picture and what the command quotes."""
    from advice_page import page, picture

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--draws", type=int, default=400)
    given = parser.parse_args()
    families = {f: found for f in given.families if (found := study(f, given.draws)) is not None}
    verdicts = {
        knob: overall([f["effects"][knob]["verdict"] for f in families.values()
                       if knob in f["effects"]])
        for knob in PREDICTED if any(knob in f["effects"] for f in families.values())
    }  # fmt: skip
    experiment = STUDIES / "fine_tuning.json"
    told = {
        "version": 1,
        "merges": sum(f["merges"] for f in families.values()),
        "runs": sum(f["runs"] for f in families.values()),
        "draws": given.draws, "verdicts": verdicts, "families": families,
    }  # fmt: skip
    written = rounded(told)
    STUDIES.mkdir(parents=True, exist_ok=True)
    (STUDIES / "advice.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    (STUDIES / "advice.svg").write_text(picture(written), encoding="utf-8")
    more = json.loads(experiment.read_text("utf-8")) if experiment.exists() else None
    (STUDIES / "advice.md").write_text(page(written, more), encoding="utf-8")
    SHIPPED.write_text(json.dumps(shipped(written), indent=1) + "\n", encoding="utf-8")
    for knob, said in verdicts.items():
        print(f"{knob:16s} {said}")


def shipped(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the command quotes: effects on retention with intervals, powers of the norm."""
    ends = ("effect", "low", "high")
    return {
        "version": 1, "merges": told["merges"], "runs": told["runs"],
        "effects": {
            knob: {
                name: {
                    "retention": {e: found["effects"][knob][e] for e in ends},
                    "merged_accuracy": {
                        e: found["effects"][knob]["merged_accuracy"][e] for e in ends
                    },
                }
                for name, found in told["families"].items() if knob in found["effects"]
            }
            for knob in told["verdicts"]
        },
        "norms": {name: found["norms"] for name, found in told["families"].items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
