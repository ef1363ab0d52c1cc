"""Experts of a family: those given, those trained by drawn settings, and some broken on purpose."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from book import Book
from family import Family, Run, Runner, State, read_state, right

Kind = Literal["given", "trained", "permuted", "flipped", "scaled", "shaken"]
"""Permuted: hidden units in another order, the same function. Flipped: half of the task vector's
rows with the other sign. Scaled: the task vector times 5. Shaken: Gaussian noise of the task
vector's norm added, tensor by tensor."""

BROKEN: tuple[Kind, ...] = ("permuted", "flipped", "scaled", "shaken")
SCALED = 5.0
BREAK_EVERY = 5
"""Of the last checkpoint of every fifth run a broken one is made."""


@dataclass(frozen=True)
class Expert:
    """One checkpoint, by what it was made with."""

    name: str
    run: Run
    step: int
    kind: Kind
    parent: str = ""
    """The expert that was broken."""

    @property
    def task(self) -> str:
        """The task that it was fine-tuned on."""
        return self.run.task

    @property
    def base(self) -> str:
        """The base that it was fine-tuned from."""
        return self.run.base


class Experts:
    """The experts of a family, on disk and in the book that tells of them."""

    def __init__(self, family: Family, book: Book) -> None:
        self.of, self.book = family, book
        self.all = {expert.name: expert for expert in _design(family)}

    def path(self, name: str) -> Path:
        """Return where an expert is or will be."""
        given = self.of.given()
        return given[name][1] if name in given else self.of.folder / f"{name}.safetensors"

    def state(self, name: str) -> State:
        """Return an expert's weights in float32."""
        return read_state(self.path(name), self.of.base_path(self.all[name].base))

    def there(self) -> list[Expert]:
        """Return the experts that have been made and measured."""
        return [e for e in self.all.values() if self.path(e.name).exists() and e.name in self.rows]

    @property
    def rows(self) -> Mapping[str, Any]:
        """What is known of each expert, by its name."""
        return {row["expert"]: row for row in self.book.rows.values()}

    def make(self, until: float, *, below: int = 1 << 30) -> None:
        """Make what is missing of runs below a number, until a time (`time.monotonic`)."""
        self.of.prepare()
        runner = Runner(self.of)
        for expert in self.all.values():
            if time.monotonic() > until:
                return
            if expert.run.number >= below:
                continue
            if expert.name in self.rows and self.path(expert.name).exists():
                continue
            began = time.process_time()
            if expert.kind == "trained":
                self._train(expert.run)
            elif expert.kind != "given":
                self._break(expert)
            trained = time.process_time() - began
            for name in self._finished(expert):
                self._measure(runner, self.all[name], trained)

    def _finished(self, expert: Expert) -> list[str]:
        if expert.kind != "trained":
            return [expert.name]
        return [_name(expert.run, stop) for stop in expert.run.stops]

    def _train(self, run: Run) -> None:
        def keep(step: int, state: State) -> None:
            note = {"task": run.task, "base": run.base, "step": str(step)}
            self.of.write(self.path(_name(run, step)), run.base, state, note)

        self.of.folder.mkdir(parents=True, exist_ok=True)
        self.of.train(run, keep)

    def _break(self, expert: Expert) -> None:
        rng = np.random.default_rng([43, expert.run.seed % 1000, len(expert.name)])
        base = read_state(self.of.base_path(expert.base))
        state = broken(self.of, expert.kind, self.state(expert.parent), base, rng)
        note = {"task": expert.task, "base": expert.base, "kind": expert.kind}
        self.of.write(self.path(expert.name), expert.base, state, note)

    def _measure(self, runner: Runner, expert: Expert, seconds: float) -> None:
        of, test = self.of, self.of.test(expert.task)
        head, labels = of.head(expert.base, expert.task), torch.cat(list(test.labels))
        base, state = read_state(of.base_path(expert.base)), self.state(expert.name)
        runner.put(state)
        accuracy = right(of, runner.features(test), head, labels)
        runner.put(base)
        below = right(of, runner.features(test), head, labels)
        moved = {n: state[n] - base[n] for n in state if n in base and base[n].ndim}
        whole = sum(float(base[n].square().sum()) for n in moved if bool(moved[n].any()))
        norm = sum(float(part.square().sum()) for part in moved.values()) ** 0.5
        self.book.add(
            {
                "family": of.name, "expert": expert.name, "kind": expert.kind,
                "parent": expert.parent, "step": expert.step,
                **{k: v for k, v in asdict(expert.run).items() if k not in ("family", "stops")},
                "accuracy": accuracy, "base_accuracy": below,
                "chance": 1 / len(head), "tested": len(labels),
                "norm": norm, "relative_norm": norm / max(whole, 1e-30) ** 0.5, "cpu_s": seconds,
            }
        )  # fmt: skip


def broken(
    family: Family, kind: Kind, state: State, base: State, rng: np.random.Generator
) -> State:
    """Return an expert's weights, broken in one of the ways of `Kind`."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
    if kind == "permuted":
        return permuted(family, state, rng)
    found: State = {}
    for name, tensor in state.items():
        if name not in base or not tensor.is_floating_point() or not tensor.ndim:
            found[name] = tensor
            continue
        tau = tensor - base[name]
        if kind == "flipped":
            signs = torch.randint(0, 2, (len(tau),), generator=generator).float() * 2 - 1
            tau = tau * signs.reshape(-1, *[1] * (tau.ndim - 1))
        elif kind == "scaled":
            tau = tau * SCALED
        elif kind == "shaken":
            noise = torch.randn(tau.shape, generator=generator)
            tau = tau + noise * (tau.norm() / noise.norm().clamp(min=1e-12))
        found[name] = base[name] + tau
    return found


def permuted(family: Family, state: State, rng: np.random.Generator) -> State:
    """Return the weights with hidden units in another order: the same function.

    `family.hidden` names the tensors and dimensions that count the same units.
    """
    found = {name: tensor.clone() for name, tensor in state.items()}
    for places in family.hidden(state):
        order: torch.Tensor | None = None
        for name, dim in places:
            if order is None:
                order = torch.from_numpy(rng.permutation(found[name].shape[dim]))
            found[name] = found[name].index_select(dim, order)
    return found


def _design(family: Family) -> Iterator[Expert]:
    for name, (run, _) in family.given().items():
        yield Expert(name, run, run.steps, "given")
    kinds = [kind for kind in BROKEN if kind != "permuted" or family.has_hidden]
    for number in range(family.draws().runs):
        for base in family.bases:  # in turn, so that a part of the work serves all
            run = family.draw(base, number)
            for stop in run.stops:
                yield Expert(_name(run, stop), run, stop, "trained")
            index, rest = divmod(number, BREAK_EVERY)
            if rest == 0:
                parent = _name(run, run.stops[-1])
                kind = kinds[index % len(kinds)]
                yield Expert(f"{base}.x{index:02d}", run, run.stops[-1], kind, parent)


def _name(run: Run, step: int) -> str:
    return f"{run.base}.{run.number:03d}.{step}"
