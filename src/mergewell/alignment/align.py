"""Align: an expert in the order of another model, written as a new folder.

The new expert computes what the old one does, which is measured before it is written; only its
units stand in other places. Every merge, and every repair, works on it afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergewell.alignment.activations import match_activations, unseen
from mergewell.alignment.matching import Matched, OnSweep
from mergewell.alignment.permutations import PermutationGraph, Permutations
from mergewell.alignment.tracing import permutation_graph
from mergewell.alignment.weights import distance, match_weights
from mergewell.alignment.writing import write_changed
from mergewell.alignment.zipit import Pairs, zipped
from mergewell.errors import DataError, ModelError
from mergewell.inputs import batches, input_files, load_inputs
from mergewell.models.dataflow import Batch, call, evaluating, tensors
from mergewell.models.loader import ModuleSource, load_state, placed
from mergewell.storage.checkpoint import Checkpoint, open_checkpoint
from mergewell.storage.manifest import Manifest
from mergewell.storage.writer import require_free_name

Match = Literal["weights", "activations"]
"""What is compared: weights, or what units do on unlabelled inputs."""

_BATCH = 64
_TRACED = 2  # samples that the flow of data is watched on
_ROUNDING = 1e-3  # a larger relative change of the outputs is no rounding: the graph is wrong


@dataclass(frozen=True, slots=True)
class Aligned:
    """How an expert's units are to be moved, and what it does."""

    graph: PermutationGraph
    matched: Matched
    names: Mapping[str, str]
    """The module's name of each of the checkpoint's tensors that it has."""
    distances: tuple[float, float]
    """Between the parameters of the two models, before and after."""
    output_change: float
    """Norm of the difference of outputs over that of the outputs: rounding."""


def align_folder(
    expert: str | Path,
    to: str | Path,
    out: str | Path,
    *,
    source: ModuleSource,
    data: str | None = None,
    samples: int = 512,
    match: Match = "weights",
    seed: int = 0,
    on_sweep: OnSweep | None = None,
) -> Manifest:
    """Write `out`: the expert with its units in the order of the model `to`.

    All tensors keep their names, shapes and dtypes; side files are copied. The manifest's `align`
    says how much nearer the expert came, how many units moved, what was kept in order and why, and
    the change of the outputs. Without data the module must come with inputs of its own to watch
    (Hugging Face models do); two inputs are enough for matching weights.

    Raises:
        ModelError: nothing can be permuted, the module does not take these weights, or the
            permuted expert would not compute the same.
        DataError: inputs that are missing or cannot be used.
        CheckpointError: checkpoints that cannot be read.
        OutputError: `out` exists or cannot be written.
    """
    began = time.perf_counter()
    require_free_name(Path(out).resolve())
    reference, checkpoint = open_checkpoint(to), open_checkpoint(expert)
    folder = source.location if source.kind == "huggingface" else str(expert)
    given = _batches(source, data, folder, samples)
    done = aligned(
        _built(source, reference), _built(source, checkpoint), given,
        names=list(checkpoint), match=match, seed=seed, on_sweep=on_sweep,
    )  # fmt: skip
    by, graph = done.matched.permutations, done.graph
    told = {
        "expert": str(Path(expert).resolve()),
        "to": str(Path(to).resolve()),
        "match": match,
        "samples": 0 if data is None else sum(_count(batch) for batch in given),
        **_told(done, match),
    }
    return write_changed(
        checkpoint,
        out,
        lambda name, tensor: graph.permuted_tensor(done.names.get(name, ""), tensor, by),
        told={"align": told},
        kind=match,
        used=(*reference.files, *(() if data is None else input_files(data))),
        seed=seed,
        began=began,
    )


def zip_folder(
    expert: str | Path,
    to: str | Path,
    out: str | Path,
    *,
    source: ModuleSource,
    data: str,
    samples: int = 512,
    pairs: Pairs = "any",
    seed: int = 0,
) -> Manifest:
    """Write `out`: an expert and the model `to` merged by joining units (ZipIt).

    Unlike `align_folder` this makes the merged model, since what is joined within one model is in
    no order of the other's. Names, dtypes and side files are the expert's; what the module does not
    have is the mean of both. The manifest's `zipit` says what was joined.

    Raises:
        ModelError, DataError, CheckpointError, OutputError: as `align_folder`; also a tensor that
            neither the module nor `to` has.
    """
    began = time.perf_counter()
    require_free_name(Path(out).resolve())
    reference, checkpoint = open_checkpoint(to), open_checkpoint(expert)
    folder = source.location if source.kind == "huggingface" else str(expert)
    given = _batches(source, data, folder, samples)
    module = _built(source, checkpoint)
    done = zipped(_built(source, reference), module, given, pairs=pairs, seed=seed)
    held = placed(module, list(checkpoint))

    def merged(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if name in held:
            return held[name].detach().to(tensor.dtype)
        if name not in reference:
            raise ModelError(f"{name} is in neither the module nor {to}; leave it out of {expert}.")
        return ((tensor.double() + reference[name].double()) / 2).to(tensor.dtype)

    told = {
        "expert": str(Path(expert).resolve()),
        "to": str(Path(to).resolve()),
        "pairs": pairs,
        "samples": sum(_count(batch) for batch in given),
        "units": sum(table.numel() for table in done.graph.identity().values()),
        "groups": len(done.graph.groups),
        "within": round(done.within, 6),
        "across": list(done.across),
        "unseen": list(done.unseen),
        "fixed": dict(done.graph.fixed),
    }
    return write_changed(
        checkpoint,
        out,
        merged,
        told={"zipit": told},
        kind="zipit",
        used=(*reference.files, *input_files(data)),
        seed=seed,
        began=began,
    )


def aligned(
    reference: nn.Module,
    expert: nn.Module,
    given: Sequence[Batch],
    *,
    names: Sequence[str] | None = None,
    match: Match = "weights",
    seed: int = 0,
    on_sweep: OnSweep | None = None,
) -> Aligned:
    """Align a module to another one in place, and return how; see `align_folder`.

    names: of the checkpoint that the expert was loaded from; its own if absent.

    Raises:
        ModelError: nothing can be permuted, or the expert would not compute the same.
        DataError: no inputs, or inputs that cannot be used.
    """
    if not given:
        raise DataError("There are no inputs to watch the modules on; give two or more.")
    graph = permutation_graph(expert, _first(given[0], _TRACED))
    if not graph.groups:
        raise ModelError(_refusal(expert, graph))
    stored = placed(expert, list(expert.state_dict()) if names is None else list(names))
    own = {id(tensor): name for name, tensor in expert.state_dict(keep_vars=True).items()}
    one, two = dict(reference.named_parameters()), dict(expert.named_parameters())
    if match == "weights":
        matched = match_weights(graph, one, two, seed=seed, on_sweep=on_sweep)
    else:
        matched = match_activations(graph, reference, expert, given, seed=seed, on_sweep=on_sweep)
    before = distance(one, two)
    change = _moved(expert, graph, matched.permutations, given[0])
    return Aligned(
        graph,
        matched,
        {name: own[id(tensor)] for name, tensor in stored.items()},
        (before, distance(one, two)),
        change,
    )


def _moved(module: nn.Module, graph: PermutationGraph, by: Permutations, batch: Batch) -> float:
    """Permute a module in place, and return the relative change of its outputs."""
    before = _outputs(module, batch)
    states = {id(t): (name, t) for name, t in module.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        for name, tensor in states.values():  # each once, under whatever name
            tensor.copy_(graph.permuted_tensor(name, tensor.detach().clone(), by))
    after = _outputs(module, batch)
    missed = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    change = (missed / max(sum(float(b.square().sum()) for b in before), 1e-300)) ** 0.5
    if not change <= _ROUNDING:
        raise ModelError(
            f"{type(module).__name__} computes something else when its units are permuted "
            f"(outputs change by {change:.2g} of their norm), so it cannot be aligned; please "
            "report its architecture."
        )
    return change


def _outputs(module: nn.Module, batch: Batch) -> list[Tensor]:
    with evaluating([module]):
        found = tensors(call(module, batch))
    return [tensor.double() for tensor in found if tensor.is_floating_point()]


def _refusal(module: nn.Module, graph: PermutationGraph) -> str:
    shown = [f"{name} {reason}" for name, reason in graph.fixed.items()][:3]
    return (
        f"{type(module).__name__} has no units that can be permuted without a change of what it "
        f"computes ({'; '.join(shown)}): align other models, or merge these as they are."
    )


def _told(done: Aligned, match: Match) -> dict[str, Any]:
    """Return what a manifest says of an alignment."""
    before, after = done.distances
    identity = done.graph.identity()
    return {
        "distance_before": before,
        "distance_after": after,
        "moved": round(done.graph.moved(done.matched.permutations), 6),
        "units": sum(places.numel() for places in identity.values()),
        "groups": {
            name: {"size": group.size, **({"within": group.within} if group.within else {})}
            for name, group in done.graph.groups.items()
        },
        "sweeps": done.matched.sweeps,
        "output_change": done.output_change,
        "fixed": dict(done.graph.fixed),
        "unseen": list(unseen(done.graph)) if match == "activations" else [],
    }


def _built(source: ModuleSource, checkpoint: Checkpoint) -> nn.Module:
    module = source.build()
    load_state(module, checkpoint)
    return module


def _batches(source: ModuleSource, data: str | None, folder: str, limit: int) -> list[Batch]:
    """Return the inputs at a path, or those that a Hugging Face module brings along."""
    if data is not None:
        model = folder if Path(folder).is_dir() else None
        return list(batches(load_inputs(data, model_folder=model, limit=limit), _BATCH))
    own: Any = getattr(source.build(), "dummy_inputs", None)
    if not isinstance(own, Mapping):
        raise DataError(
            f"{source.location} comes with no inputs to watch it on; add --data with two or more."
        )
    return [{str(name): tensor for name, tensor in own.items()}]  # pyright: ignore


def _first(batch: Batch, count: int) -> Batch:
    if isinstance(batch, Tensor):
        return batch[:count]
    return {name: tensor[:count] for name, tensor in batch.items()}


def _count(batch: Batch) -> int:
    return len(batch) if isinstance(batch, Tensor) else len(next(iter(batch.values())))
