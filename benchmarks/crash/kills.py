"""Kills merges at random moments and resumes them: is any output ever damaged?

    python benchmarks/crash/kills.py --count 500 --json docs/benchmarks/kills.json

This process imports torch once, compiles what is compiled, and forks a child for every merge; it
never starts a thread, so that forking is safe. A round is a merge that is killed with SIGKILL
after a random part of the time that it takes undisturbed. Then the output's name must be free or
hold the complete result, and going on must give the same bytes. Rounds that finish before the kill
are made again with another moment; those killed after the rename are counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from toys import family, tensors

from mergewell.cli.main import main as mergewell
from mergewell.storage.checkpoint import open_checkpoint
from mergewell.storage.manifest import verify_files
from mergewell.storage.views import write_task_vector

Job = Callable[[Path], int]


@dataclass(frozen=True)
class Writer:
    """A way to write an output: jobs that run side by side, and how to go on after a kill."""

    name: str
    jobs: tuple[Job, ...]
    resume: Job
    check: Callable[[Path], bool]
    """Whether an output that exists is complete and has the expected bytes."""


def fork(job: Job, out: Path) -> int:
    """Run a job in a child that says nothing; return its process number."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = job(out)
        finally:
            os._exit(code)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(path: Path) -> dict[str, object]:
    """Return the bytes of an output, the manifest without the time that it took."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found: dict[str, object] = {file.name: file.read_bytes() for file in files}
    if "manifest.json" in found:
        manifest = json.loads(found["manifest.json"])
        del manifest["seconds"]
        found["manifest.json"] = manifest
    return found


def merging(work: Path, name: str, arguments: list[str], *, shards: int = 0) -> Writer:
    """Return the writer that is `mergewell merge` with these arguments, in one job or several."""

    def job(*more: str) -> Job:
        return lambda out: mergewell(["merge", *arguments, "--out", str(out), *more])

    reference = work / "expected" / name
    if code_of(fork(job("--workers", "1"), reference)) != 0:
        raise SystemExit(f"{name}: the undisturbed merge failed")
    expected = contents(reference)

    def check(out: Path) -> bool:
        return verify_files(out) == [] and contents(out) == expected

    if shards == 0:
        return Writer(name, (job(),), job("--resume"), check)
    jobs = tuple(job("--shard", f"{i}/{shards}") for i in range(shards))
    return Writer(name, jobs, job("--resume"), check)


def writers(work: Path) -> list[Writer]:
    """Return all writers that mergewell has, over small checkpoints made in `work`."""
    (work / "expected").mkdir(parents=True)
    found: list[Writer] = []
    for shards in (1, 3):
        base, experts = family(work / f"family{shards}", shards=shards)
        flags = ["--base", str(base)] + [f for e in experts for f in ("--expert", str(e))]
        ties = [*flags, "--method", "ties", "--set", "density=0.3"]
        for job in ([*ties], [*flags, "--method", "average"]):  # compiles here, for all children
            with contextlib.redirect_stdout(sys.stderr):
                code = mergewell(["merge", *job, "--workers", "1", "--out", str(work / "warm")])
            shutil.rmtree(work / "warm")
            if code != 0:
                raise SystemExit("the first merge failed")
        found.append(merging(work, f"average, {shards} files", [*flags, "--method", "average"]))
        found.append(merging(work, f"ties, {shards} files", ties))
    found.append(merging(work, "ties, sha256", [*ties, "--hash", "sha256"]))
    found.append(merging(work, "ties, 3 shard jobs", ties, shards=3))
    recipe = work / "split.yaml"
    paths = "".join(f"- {{path: {e}}}\n" for e in experts)
    recipe.write_text(
        f"base: {base}\nexperts:\n{paths}method: {{name: dare}}\nshard_bytes: 100000\n"
    )
    found.append(merging(work, "dare, split into files", [str(recipe)]))
    found.append(merging(work, "dare, split, 2 shard jobs", [str(recipe)], shards=2))

    opened = open_checkpoint(base)
    moved = {n: t + (0.1 if t.is_floating_point() else 0) for n, t in tensors(0).items()}

    def task_vector(out: Path) -> int:
        write_task_vector(out, opened, moved, {"made by": "kills.py"})
        return 0

    reference = work / "expected" / "task_vector"
    if code_of(fork(task_vector, reference)) != 0:
        raise SystemExit("the undisturbed task vector failed")
    expected = reference.read_bytes()
    found.append(
        Writer("task vector", (task_vector,), task_vector, lambda out: out.read_bytes() == expected)
    )
    return found


def duration(writer: Writer, out: Path) -> float:
    """Return the seconds that the jobs of a writer take undisturbed."""
    began = time.perf_counter()
    for child in [fork(job, out) for job in writer.jobs]:
        code_of(child)
    taken = time.perf_counter() - began
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return taken


def a_round(writer: Writer, out: Path, moment: float, victim: int) -> dict[str, int]:
    """Kill one job of a writer, go on, and return what came to pass."""
    children = [fork(job, out) for job in writer.jobs]
    time.sleep(moment)
    os.kill(children[victim], signal.SIGKILL)
    codes = [code_of(child) for child in children]
    tally = dict.fromkeys(("kills", "after_the_rename", "resumed", "damaged", "not_resumed"), 0)
    if codes[victim] != -signal.SIGKILL:
        tally["damaged"] += not writer.check(out)
        return tally
    tally["kills"] = 1
    if out.exists():
        tally["after_the_rename"] += 1
        tally["damaged"] += not writer.check(out)
        return tally
    if code_of(fork(writer.resume, out)) == 0 and out.exists() and writer.check(out):
        tally["resumed"] += 1
    else:
        tally["not_resumed"] += 1
    return tally


def main() -> None:
    """Run the campaign and write or print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="resumes to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a folder on the disk to try")
    parser.add_argument("--json", type=Path, help="where to write the result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="mergewell-kills-", dir=given.work))
    began = time.perf_counter()
    generator = random.Random(given.seed)
    result: dict[str, dict[str, float]] = {}
    try:
        ways = writers(work)
        out = work / "out"
        times = {way.name: min(duration(way, out) for _ in range(3)) for way in ways}
        rounds = 0
        while sum(tally["resumed"] for tally in result.values()) < given.count:
            way = ways[rounds % len(ways)]
            rounds += 1
            moment = generator.uniform(0.0, 1.1 * times[way.name])
            found = a_round(way, out, moment, generator.randrange(len(way.jobs)))
            tally = result.setdefault(way.name, {"seconds_undisturbed": round(times[way.name], 4)})
            for key, number in found.items():
                tally[key] = tally.get(key, 0) + number
            if found["damaged"] or found["not_resumed"]:
                raise SystemExit(f"{way.name}, killed after {moment:.4f} s: {found}; see {work}")
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            # of a job killed after the rename; the next round is another recipe's
            shutil.rmtree(work / f".{out.name}.mergewell", ignore_errors=True)
    except BaseException:
        print(f"left for a look: {work}", file=sys.stderr)
        raise
    shutil.rmtree(work)
    keys = ("kills", "after_the_rename", "resumed", "damaged", "not_resumed")
    total = {key: int(sum(tally[key] for tally in result.values())) for key in keys}
    text = json.dumps(
        {
            "seed": given.seed,
            "rounds": rounds,
            **total,
            "seconds": round(time.perf_counter() - began, 1),
            "writers": result,
        },
        indent=2,
    )
    if given.json is not None:
        given.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
