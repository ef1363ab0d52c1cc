"""What `merge` and `plan` do with a mixture of experts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mergewell.cli.amounts import byte_count
from mergewell.cli.explain import print_json
from mergewell.cli.given import refuse_flags
from mergewell.cli.progress import steps
from mergewell.mixture.choice import Mixture
from mergewell.mixture.plan import plan_mixture
from mergewell.mixture.write import write_mixture
from mergewell.storage.manifest import Algorithm


def merge_mixture(
    mixture: Mixture,
    out: Path,
    *,
    flags: Mapping[str, object],
    algorithm: Algorithm,
    as_json: bool,
) -> None:
    """Assemble a mixture; `flags` are those that have no meaning for one.

    Raises:
        RecipeError: such a flag is set.
        UserError: as `write_mixture`.
    """
    refuse_flags(flags, "a mixture of experts is copied together and not merged")
    planned = plan_mixture(mixture)
    written = 0
    with steps(in_bytes=True) as shown:

        def progress(count: int) -> None:
            nonlocal written
            written += count
            shown.update("mixture", written, planned.write_bytes)

        manifest = write_mixture(planned, out, algorithm=algorithm, on_progress=progress)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
        return
    print(
        f"{out}: {planned.form.architecture} of {len(mixture.experts)} experts, "
        f"{mixture.experts_per_token} a token; {manifest.tensors} tensors, "
        f"{byte_count(planned.write_bytes)} in {manifest.seconds:.1f} s."
    )


def show_mixture(mixture: Mixture, *, as_json: bool) -> None:
    """Show the plan of a mixture.

    Raises:
        UserError: as `plan_mixture`.
    """
    planned = plan_mixture(mixture)
    data = planned.as_data()
    if as_json:
        print_json(data)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "shape", "dtype", "method", "from"):
        table.add_column(heading)
    for row in data["tensors"]:
        origin = row["from"]
        table.add_row(
            escape(row["name"]),
            "×".join(map(str, row["shape"])),
            row["dtype"],
            row["method"],
            "" if origin is None else escape(f"{origin['model']}: {origin['tensor']}"),
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    print(
        f"\n{planned.form.architecture}: {planned.layers.count} layers of "
        f"{len(mixture.experts)} experts, {mixture.experts_per_token} a token, gates "
        f"{mixture.gate} · {len(planned.specs)} tensors · reads {byte_count(planned.read_bytes)} · "
        f"writes {byte_count(planned.write_bytes)} · memory up to {byte_count(planned.peak_bytes)}"
    )
