"""One merge after another: made, judged on the tests, and looked at by every predictor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from book import Book, Row
from experts import Experts
from family import Family, Runner, State, read_state
from merges import ExpertSet, Merge, draw_merges, draw_set, needs_inputs, recipe
from predictors import (
    Numbers,
    by_inputs,
    by_labels,
    by_weights,
    diagnosed,
    spreads,
)
from pulls import Pulls
from seen import Eye
from torch import Tensor, nn

from mergewell.calibration.collect import calibrate
from mergewell.calibration.data import Data, first_samples
from mergewell.calibration.file import write_calibration
from mergewell.calibration.models import simplex
from mergewell.diagnostics.base import Evidence
from mergewell.diagnostics.ops import measure_matrices, measure_task_vectors, measure_top_conflicts
from mergewell.errors import UserError
from mergewell.models.capture import measure_m_loss
from mergewell.models.ensemble import ensemble_outputs
from mergewell.models.loader import load_state
from mergewell.models.trace import trace
from mergewell.plan import make_plan
from mergewell.prediction.look import Seen, look
from mergewell.run import merge_tensors

BASE = "base"
HELD = 1 << 30
"""Bytes of experts, and of their gradients, that are held."""
MOST = 8
"""Experts in a set."""


class Atlas:
    """The merges of one family, measured set by set."""

    def __init__(self, family: Family, experts: Experts, book: Book) -> None:
        self.of, self.experts, self.book = family, experts, book
        self.eye = Eye(family)
        self.modules = [family.factory().eval() for _ in range(MOST)]
        self.spare = family.factory().eval()
        self.trace = trace(self.spare, first_samples(family.inputs(family.tasks[0]).batches))
        size = sum(4 * part.numel() for part in self.spare.state_dict().values())
        most = max(9, min(120, HELD // size))
        self.state = lru_cache(most)(experts.state)
        self.pulls = Pulls(family, self.spare, self.state, most)

    def measure(self, base: str, number: int, until: float) -> Iterator[Row]:
        """Measure what is missing of one set; nothing where an expert is not there yet."""
        of = draw_set(self.of, self.experts, base, number)
        keys = {"family": self.of.name, "base": base, "set": number}
        wanted = [m for m in draw_merges(of) if not self.book.has({**keys, "merge": m.number})]
        if not wanted or any(e.name not in self.experts.rows for e in of.experts):
            return
        began = time.process_time()
        place = Place(self, of)
        spent = time.process_time() - began
        for merge in wanted:
            if time.monotonic() > until:
                return
            row = {
                **keys, "merge": merge.number, "experts": [e.name for e in of.experts],
                "tasks": [e.task for e in of.experts], "reason": of.reason,
                "method": merge.method, "parameters": dict(merge.parameters),
                "coefficients": list(merge.coefficients), "seed": merge.seed,
            }  # fmt: skip
            try:
                row |= place.merged(merge)
            except UserError as error:
                row |= {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            row["set_s"] = spent
            self.book.add(row)
            yield row


class Place:
    """A set: what is known of its experts, and the merges made of them."""

    def __init__(self, atlas: Atlas, of: ExpertSet) -> None:
        self.atlas, self.of, self.family = atlas, of, atlas.of
        family, experts = atlas.of, of.experts
        self.open()
        self.labelled = of.number % family.draws().labelled_every == 0
        tests = [
            [atlas.eye.test(name, task, load) for task in self.tasks] for name, load in self.models
        ]
        self.answers = [torch.cat(list(family.test(task).labels)) for task in self.tasks]
        self.own, self.below, self.together, self.ensemble = [], [], [], []
        for j, head in enumerate(self.heads):
            logits = [family.logits(tests[k][j], head) for k in range(len(tests))]
            both = ensemble_outputs(logits[1:], "logits").argmax(-1)
            self.own.append(_right(logits[j + 1], self.answers[j]))
            self.below.append(_right(logits[0], self.answers[j]))
            self.together.append(both)
            self.ensemble.append(float((both == self.answers[j]).double().mean()))
        sums = measure_task_vectors(self.plan)
        self.known: dict[str, Any] = {
            "experts": tuple(f"{i}" for i in range(len(experts))),
            "products": {n: s.products for n, s in sums.items()},
            "conflict_mass": {n: s.mass for n, s in sums.items()},
            "conflict_pairs": {n: s.pairs for n, s in sums.items()},
            "sums": {n: s.sums for n, s in sums.items()},
            "sizes": {n: self.plan.tasks[n].spec.numel for n in sums},
            "top_conflicts": measure_top_conflicts(self.plan),
            "subspaces": measure_matrices(self.plan).measured,
        }
        for module, state in zip(atlas.modules, self.states, strict=False):
            load_state(module, state)
        self.unique = {task: family.inputs(task) for task in dict.fromkeys(self.tasks)}
        self.batches = [batch for part in self.unique.values() for batch in part.batches]
        self.constant: Numbers = {}
        if self.labelled:
            self.constant = atlas.pulls.of_set(self.known, self.base, experts, atlas.modules)

    def open(self) -> None:
        """Read the models and run them on the tasks' inputs."""
        atlas, family, experts = self.atlas, self.family, self.of.experts
        self.base = _base_state(family.base_path(self.of.base))
        self.states = [atlas.state(e.name) for e in experts]
        self.tasks = [e.task for e in experts]
        self.heads = [family.head(e.base, e.task) for e in experts]
        self.models = [(f"{BASE}:{self.of.base}", lambda: self.base)] + [
            (e.name, lambda s=s: s) for e, s in zip(experts, self.states, strict=True)
        ]
        self.seen = [
            [atlas.eye.inputs(name, task, load) for task in self.tasks]
            for name, load in self.models
        ]
        self.plan = make_plan(recipe(family, atlas.experts, self.of, AVERAGE(len(experts))))

    def merged(self, merge: Merge) -> Row:
        """Return what was measured of one merge and all predictors of it."""
        atlas, family, clock = self.atlas, self.family, _Clock()
        plan = make_plan(recipe(family, atlas.experts, self.of, merge, self.calibration(merge)))
        state = {**self.base, **{n: t.float() for n, t in merge_tensors(plan)}}
        clock.lap("merge_s")
        runner = atlas.eye.merged(state)
        seen = {task: look(runner.module, family.inputs(task).batches) for task in self.unique}
        measured = self._measured(runner)
        clock.lap("test_s")
        shares = simplex(merge.coefficients)
        count = len(self.tasks)
        mine = [seen[task] for task in self.tasks]
        numbers, each = by_weights(self.base, self.states, state, self.known["subspaces"])
        clock.lap("weights_s")
        more, by_expert = by_inputs(family, self.heads, self.seen, mine)
        numbers, each = numbers | more, each | by_expert
        layers = self._m_loss(runner.module, shares, "merged")
        evidence = dict(self.known) | {
            "layers": layers, "coefficients": tuple(shares),
            "features": self._features(seen), "outputs": self._outputs(seen),
        }  # fmt: skip
        if merge.number % family.draws().own_every == 0:
            own = self._m_loss(runner.module, shares, "own")
            numbers |= {
                f"u_{k.removeprefix('u_').replace('m_loss', 'm_loss_own')}": v
                for k, v in diagnosed(Evidence(**self.known, layers=own), only=["m_loss"]).items()
            }
        labels = [torch.cat(list(family.inputs(task).labels)) for task in self.tasks]
        accuracy, below, by_answers = by_labels(family, self.heads, labels, self.seen, mine)
        numbers |= diagnosed(Evidence(**evidence, accuracy=accuracy, base_accuracy=below))
        each |= by_answers
        clock.lap("inputs_s")
        if self.labelled:
            experts, modules = self.of.experts, atlas.modules
            numbers |= atlas.pulls.of_merge(runner.module, self.known, experts, modules)
        clock.lap("gradients_s")
        numbers |= self.constant | spreads(each)
        return {
            "own": self.own, "below": self.below, "ensemble": self.ensemble,
            "chance": [1 / len(head) for head in self.heads], **measured,
            "tested": [len(answers) for answers in self.answers],
            "predictors": numbers, "each": each, **clock.laps, "count": count,
        }  # fmt: skip

    def _measured(self, runner: Runner) -> dict[str, list[float]]:
        """Return the merge's accuracy on each expert's task, and how often the ensemble agrees."""
        features = {task: runner.features(self.family.test(task)) for task in self.unique}
        accuracy, agreement = [], []
        for j, head in enumerate(self.heads):
            logits = self.family.logits(features[self.tasks[j]], head)
            accuracy.append(_right(logits, self.answers[j]))
            alike = logits.argmax(-1) == self.together[j]
            agreement.append(float(alike.double().mean()))
        return {"merged": accuracy, "agreement": agreement}

    def _m_loss(self, merged: nn.Module, shares: Sequence[float], mode: Any) -> Any:
        experts = self.atlas.modules[: len(self.states)]
        return measure_m_loss(
            experts, self.atlas.trace, batches=self.batches, coefficients=shares, mode=mode,
            merged=merged,
        )  # fmt: skip

    def _pooled(self, k: int, task: str) -> Seen:
        return self.seen[k][self.tasks.index(task)]

    def _features(self, merged: Mapping[str, Seen]) -> dict[str, Tensor]:
        """Return features of every model, the base first and the merge last, [P, N, D]."""
        models = range(len(self.states) + 1)
        blocks = next(iter(merged.values())).blocks
        return {
            block: torch.stack(
                [
                    *(
                        torch.cat([self._pooled(k, t).blocks[block] for t in merged])
                        for k in models
                    ),
                    torch.cat([one.blocks[block] for one in merged.values()]),
                ]
            )
            for block in blocks
        }

    def _outputs(self, merged: Mapping[str, Seen]) -> Tensor:
        models = range(len(self.states) + 1)
        known = [torch.cat([_whole(self._pooled(k, t)) for t in merged]) for k in models]
        return torch.stack([*known, torch.cat([_whole(one) for one in merged.values()])])

    def calibration(self, merge: Merge) -> Path | None:
        """Return the statistics of the experts' inputs that a method is made from."""
        families = needs_inputs(merge.method)
        if not families:
            return None
        path = self.family.folder / f"calibration.{os.getpid()}.safetensors"
        path.unlink(missing_ok=True)  # the set or the families differ from the last one's
        parts = [self.family.inputs(task) for task in self.tasks]
        batches = [_copied(batch) for part in parts for batch in part.batches]
        owners = [j for j, part in enumerate(parts) for _ in part.batches]
        data = Data(
            self.family.factory, batches, sum(len(t) for p in parts for t in p.labels),
            owners=owners, gram="gram" in families,
        )  # fmt: skip
        write_calibration(path, calibrate(self.plan, data))
        return path


def AVERAGE(count: int) -> Merge:  # noqa: N802 - stands for a constant
    """Return the plain average of some experts."""
    return Merge(0, "average", {}, (1.0,) * count, 0)


@lru_cache(4)
def _base_state(path: Path) -> State:
    return read_state(path)


def _right(logits: Tensor, answers: Tensor) -> float:
    return float((logits.argmax(-1) == answers).double().mean())


def _whole(seen: Seen) -> Tensor:
    return torch.cat(seen.outputs)


def _copied(batch: Any) -> Any:
    """Return a batch of its own identity: tasks may come twice."""
    return batch.clone() if isinstance(batch, Tensor) else {**batch}


class _Clock:
    """CPU seconds from one lap to the next."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        """End a lap."""
        now = time.process_time()
        self.laps[name], self._last = now - self._last, now
