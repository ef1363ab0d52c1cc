"""Feeds mutated headers, recipes and mergekit configurations to mergewell.

    python benchmarks/crash/fuzz.py --count 100000 --json docs/benchmarks/fuzz.json

Each case must be read, or refused by a `UserError` of one sentence, within two seconds and two
gigabytes. Half of the cases are safetensors files; the others are recipes, ours and mergekit's,
resolved against small checkpoints as far as `mergewell plan` goes. Case n of a seed is always the
same; `--only n` makes just that one.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from toys import family

from mergewell.errors import UserError
from mergewell.plan import make_plan
from mergewell.recipe import read_recipe
from mergewell.storage.checkpoint import open_checkpoint

LIMIT_S = 2
MEMORY = 2 << 30
LONGEST = 2100
"""Characters that a message may have."""

TOKENS = (
    b"null", b"true", b"-1", b"0", b"1e999", b"-0.0", b"NaN", b"Infinity", b"9223372036854775807",
    b"9223372036854775808", b"1" * 5000, b"[]", b"{}", b'""', b"[[" * 3000, b"{" * 3000, b"\xff",
    b"\x00", b"\xed\xa0\x80", b'"\\ud800"', b"1.5", b"'", b'"', b"F8_E4M3", b"I64", b"Q4", b"*",
    b"&a ", b"*a", b"<<: *a", b"!!python/object:os.system x", b"!!binary aaaa", b"!!set {a}", b"? ",
    b"- ", b": ",
    b"\n", b"\n  ", b"\t", b"#", b"|", b">", b"%", b"2024-01-01", b"0x1f", b"0o17", b"1_0",
    b"~", b"base", b"experts", b"method", b"name", b"path", b"rules", b"match", b"models",
    b"slices",
    b"parameters", b"weight", b"density", b"layer_range", b"sources", b"merge_method", b"filter",
    b"value", b"data_offsets", b"shape", b"dtype", b"__metadata__", b"shard_bytes: 1\n",
)  # fmt: skip

BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
)


def mutated(seed: bytes, generator: random.Random) -> bytes:
    """Return `seed` after up to eight random changes."""
    data = bytearray(seed)
    for _ in range(generator.choice((0, 1, 1, 1, 1, 2, 3, 8))):
        at = generator.randrange(len(data) + 1)
        end = min(len(data), at + generator.choice((1, 1, 2, 4, 8, 16, 64)))
        match generator.randrange(7):
            case 0:
                if data and at < len(data):
                    data[at] ^= 1 << generator.randrange(8)
            case 1:
                data[at:end] = b""
            case 2:
                data[at:at] = generator.choice(TOKENS)
            case 3:
                data[at:end] = generator.choice(TOKENS)
            case 4:
                data[at:at] = data[at:end] * generator.choice((1, 2, 20))
            case 5:
                del data[at:]
            case _:
                data[at:end] = bytes(generator.randrange(256) for _ in range(end - at))
    return bytes(data)


def seeds(work: Path) -> tuple[list[bytes], list[bytes]]:
    """Return the files of weights and the recipes that are mutated, over checkpoints in `work`."""
    family(work, experts=2)
    small = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.ones(())}
    from safetensors.torch import save

    weights = [save(small), save(small, {"format": "pt", "d": "a"}), save({})]
    recipes = [
        b"base: base\nexperts:\n- {path: expert0, coefficient: 0.5}\n- path: expert1\n"
        b"method: {name: ties, density: [0.5, 0.2]}\nseed: 3\ndtype: float32\nshard_bytes: 90000\n"
        b'rules:\n- {match: "*.bias", method: {name: keep, model: 1}}\n'
        b'- {match: "scale", omit: true}\n- match: "embed.*"\n  coefficients: [1.0, 2.0]\n',
        b"base: base\nbase_layers: [{start: 0, stop: 1}]\nexperts:\n- path: expert0\n"
        b"  layers: [{start: 1, stop: 2}]\nmethod: {name: task_arithmetic, scale: 0.4}\n",
        b"experts: [{path: expert0}, {path: expert1}]\nmethod: {name: slerp, t: 0.3}\n",
        b"merge_method: dare_ties\nbase_model: base\nmodels:\n- model: expert0\n  parameters:\n"
        b"    weight: 0.3\n    density: 0.5\n- model: expert1\n  parameters: {weight: [0, 1]}\n"
        b"parameters: {normalize: true}\ndtype: bfloat16\n",
        b"slices:\n- sources:\n  - model: expert0\n    layer_range: [0, 1]\n"
        b"  - model: expert1\n    layer_range: [0, 1]\nmerge_method: slerp\nbase_model: expert0\n"
        b"parameters:\n  t:\n  - filter: bias\n    value: [0, 0.5, 1]\n  - value: 0.5\n"
        b"dtype: float16\n",
        b"merge_method: passthrough\nslices:\n- sources: [{model: base, layer_range: [0, 2]}]\n",
        BOMB,
        BOMB + b"experts: *i\nmethod: *i\n",
        BOMB + b"experts: [{path: expert0}]\nmethod: {name: ties, density: *i}\n",
        BOMB + b"models: *i\nmerge_method: linear\nparameters: {t: *i}\n",
    ]
    return weights, recipes


class TooSlowError(BaseException):
    """Not an Exception, so that nobody takes it for an error of the file."""


def ring(*_: object) -> None:
    raise TooSlowError


def attempt(path: Path) -> str:
    """Read one file as far as headers go; return what became of it."""
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        if path.suffix == ".safetensors":
            with open_checkpoint(path) as found:
                list(found.specs)
        else:
            make_plan(read_recipe(path))
    except UserError as error:
        text = str(error)
        if not text or "\n" in text or len(text) > LONGEST:
            return f"bad message: {text[:200]!r} ({len(text)} characters)"
        return type(error).__name__
    except TooSlowError:
        return f"hang: {traceback.format_exc()[-700:]}"
    except BaseException:
        return f"crash: {traceback.format_exc()[-700:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read"


def main() -> None:
    """Run the campaign and write or print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="make this case alone and keep its file")
    parser.add_argument("--json", type=Path, help="where to write the result")
    given = parser.parse_args()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="mergewell-fuzz-") as folder:
        work = Path(folder)
        weights, recipes = seeds(work)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        began = time.perf_counter()
        outcomes: dict[str, Counter[str]] = {"headers": Counter(), "recipes": Counter()}
        failures: list[str] = []
        cases = range(given.count) if given.only is None else [given.only]
        for case in cases:
            generator = random.Random(f"{given.seed} {case}")
            kind = "headers" if case % 2 == 0 else "recipes"
            path = work / ("case.safetensors" if kind == "headers" else "case.yaml")
            pool = weights if kind == "headers" else recipes
            data = mutated(generator.choice(pool[:6] if case % 10 else pool), generator)
            if kind == "headers" and generator.random() < 0.7 and len(data) > 8:
                # Most cases have a length that fits, or hardly any would get past it.
                end = data.rfind(b"}") + 1
                data = max(0, end - 8).to_bytes(8, "little") + data[8:]
            path.write_bytes(data)
            outcome = attempt(path)
            outcomes[kind][outcome.partition(":")[0]] += 1
            if ":" in outcome:
                failures.append(f"case {case}: {outcome}")
                print(failures[-1], file=sys.stderr, flush=True)
            if given.only is not None:
                Path("fuzz-case" + path.suffix).write_bytes(data)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    text = json.dumps(
        {
            "seed": given.seed,
            "cases": len(cases),
            "failures": len(failures),
            "outcomes": {kind: dict(sorted(found.items())) for kind, found in outcomes.items()},
            "peak_mb": round(peak / 1e6),
            "seconds": round(time.perf_counter() - began, 1),
        },
        indent=2,
    )
    if given.json is not None:
        given.json.write_text(text + "\n")
    print(text)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
