"""Write docs/studies/demo_experts.json, the figures of demo_experts.md.

    python benchmarks/experts/figures.py [--assets FOLDER] [--out FILE]

Test and validation are what `train_vision.py` left in the demo's assets; what was tried is
`tried.csv`, the rows as the page has them, since the scripts that made them are not kept.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "src" / "mergewell" / "demo" / "assets" / "vision"
OUT = ROOT / "docs" / "studies" / "demo_experts.json"
WORDS = ("head", "training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    found: dict[str, Any] = {"version": 1, "seeds": 1}
    for split in ("test", "validation"):
        found[split] = rounded(json.loads((given.assets / f"{split}.json").read_text()))
        del found[split]["version"]
    with Path(__file__).with_name("tried.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        found["tried"] = [{k: v if k in WORDS else float(v) for k, v in r.items()} for r in rows]
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """Return numbers in %, to two digits behind the point."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
