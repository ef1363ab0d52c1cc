"""The calibration checkpoint: a safetensors file of states, with what they are of in its header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergewell.calibration.plain import plain, unplain
from mergewell.calibration.result import FAMILIES, Calibration, Head, Model
from mergewell.errors import CheckpointError, DataError, OutputError
from mergewell.storage.durable import write_durably
from mergewell.storage.header import build_header
from mergewell.storage.spec import TensorSpec
from mergewell.storage.weight_file import SafetensorsFile

VERSION = 1
_KEY = "mergewell.calibration"


def write_calibration(path: str | Path, calibration: Calibration) -> None:
    """Write a calibration as one file, which appears whole or not at all.

    Tensors are named FAMILY/PLACE/KEY; the rest is JSON under `mergewell.calibration` in the
    metadata.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise OutputError(
            f"{path} exists already and nothing is overwritten; choose another name or remove it."
        )
    tensors = {
        f"{key}/{part}": tensor.detach().cpu().contiguous()
        for key, state in calibration.states.items()
        for part, tensor in state.items()
    }
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in sorted(tensors.items())]
    head = calibration.head
    about = {
        "version": VERSION,
        "data": head.data,
        "samples": head.samples,
        "batches": head.batches,
        "mode": head.mode,
        "coefficients": head.coefficients,
        "models": [asdict(model) for model in head.models],
        "units": [plain(unit) for unit in head.units],
        "blocks": head.blocks,
        "uncovered": dict(head.uncovered),
        "owners": head.owners,
        "grams": dict(head.grams),
        "forward": head.forward,
        "fisher": head.fisher,
        "done": sorted(calibration.done),
        "seen": calibration.seen,
    }
    header, _ = build_header(specs, {"format": "pt", _KEY: json.dumps(about)})
    body = (_bytes(tensors[spec.name]) for spec in specs)
    write_durably(path, header + b"".join(body))


def read_calibration(path: str | Path) -> Calibration:
    """Return the calibration in a file.

    Raises:
        CheckpointError: there is none, or it is damaged.
        DataError: the file is no calibration, or one of another version.
    """
    path = Path(path)
    file = SafetensorsFile(path)
    if _KEY not in file.metadata:
        raise DataError(f"{path} is no calibration; give a file that `mergewell calibrate` wrote.")
    states: dict[str, dict[str, Tensor]] = {}
    for name, spec in file.specs.items():
        key, _, part = name.rpartition("/")
        if key.startswith("cka/"):  # of older files; it is now made of the features
            continue
        tensor = file.read(name, 0, spec.numel).view(spec.shape).clone()
        states.setdefault(key, {})[part] = tensor
    try:
        about: Any = json.loads(file.metadata[_KEY])
        if about["version"] != VERSION:
            raise DataError(
                f"{path} is a calibration of version {about['version']} and this is mergewell for "
                f"version {VERSION}; calibrate again."
            )
        head = Head(
            data=about["data"],
            samples=about["samples"],
            batches=about["batches"],
            mode=about["mode"],
            coefficients=tuple(about["coefficients"]),
            models=tuple(Model(**model) for model in about["models"]),
            units=tuple(unplain(unit) for unit in about["units"]),
            blocks=tuple(about["blocks"]),
            uncovered=about["uncovered"],
            owners=tuple(about.get("owners", ())),  # files made before these were gathered
            grams=about.get("grams", {}),
            forward=about.get("forward", ""),
            fisher=about.get("fisher", ""),
        )
        done, seen = frozenset[int](about["done"]), int(about["seen"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the calibration's header cannot be read ({error!r}); calibrate again."
        ) from error
    _check_states(path, head, states)
    return Calibration(head, done, seen, states)


def join_calibrations(paths: Sequence[str | Path]) -> Calibration:
    """Return several files' calibrations as one.

    Raises:
        DataError: no file is named, or two do not belong together; see `Calibration.join`.
        CheckpointError: a file is missing or damaged.
    """
    if not paths:
        raise DataError("No calibration is named; name the files to join.")
    result = read_calibration(paths[0])
    for path in paths[1:]:
        result = result.join(read_calibration(path), names=(str(paths[0]), str(path)))
    return result


def _check_states(path: Path, head: Head, states: dict[str, Any]) -> None:
    wanted = {f"m_loss/{unit.name}" for unit in head.units}
    wanted |= {f"{family}/{b}" for b in head.blocks for family in ("moments", "drift", "features")}
    missing = wanted - states.keys()
    strange = [key for key in states if key.partition("/")[0] not in FAMILIES]
    if missing or strange:
        raise CheckpointError(
            f"{path}: {min(missing) if missing else strange[0]} is "
            f"{'missing' if missing else 'not known'}; calibrate again."
        )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
