"""The frozen prefix: what enters the first adapted layer, computed once for all passes over the windows.

Layers below the first adapted one give the same hidden states for a window at every pass: nothing in them is trained,
and dropout is in adapters alone. So they run once, streamed, and their boundary activations are kept. What enters C's
first layer is what enters B's, run on through the layers between.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.errors import DataError, PipelineError
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.storage.outputs import Output, claim
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.streaming.record import RunRecord
from mistral_prune_lora.streaming.run import run_to_file
from mistral_prune_lora.streaming.shards import Shard
from mistral_prune_lora.text.windows import Windows

_AGAIN = "make them again"


def prefix_sources(student: Student, first: int) -> list[LayerSource]:
    """The layers of a student below one, in order."""
    return [source for source in student.sources() if source.index < first]


def prefix_states(
    student: Student,
    first: int,
    windows: Windows,
    output: str | Path,
    *,
    compute: Compute,
    start: str | Path | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
) -> None:
    """Run windows through the layers below one and keep what enters it. A killed run goes on from its last batch.

    Args:
        student: whose layers they are.
        first: the first adapted layer.
        windows: the training windows.
        output: a file of boundary activations.
        compute: device, dtype, batch size, memory.
        start: such states of the same windows further below, to set out from: B's for C.
        overwrite: replace what holds no such states, too; never an input.
        shard: which of the windows; None takes all.

    Raises:
        DataError: `start` is of other windows, or not of layers that lie below; a token id without an embedding; no
            layer lies below the first.
        CheckpointError: weights are missing or do not fit.
        PipelineError: the output may not be written; memory or disk space does not suffice.
    """
    _check_any(student, first, output)
    claim([prefix_output(output)], [student.model_dir, *student.bundles, start], overwrite=overwrite)
    passage, sources = Passage(student.checkpoint(), windows, compute).shard(shard), prefix_sources(student, first)
    origin = passage.origin(start)
    done = origin.record.layers
    if done != [source.index for source in sources[: len(done)]]:
        raise DataError(
            f"ran layers {done}, and the student runs {[source.index for source in sources]} below layer {first}",
            where=start,
            mend="name the states of a part that lies below, or none",
        )
    if start is not None:
        _check_same(origin.record, _record(student, sources[: len(done)], passage.windows, compute), start)
    run_to_file(passage, origin, sources[len(done) :], output)


def open_prefix(
    path: str | Path, student: Student, first: int, windows: Windows, dtype: torch.dtype, device: torch.device
) -> ActivationReader:
    """Open stored prefix states.

    Raises:
        DataError: they are of other windows, layers or weights, or of another dtype.
        CheckpointError: it is no file of activations.
    """
    _check_any(student, first, path)
    reader = ActivationReader(path)
    wanted = _record(student, prefix_sources(student, first), windows, Compute(device, dtype))
    _check_same(RunRecord.parse(reader.run, path), wanted, path)
    return reader


def _check_any(student: Student, first: int, path: str | Path) -> None:
    """Raise a DataError where no layer lies below the first adapted one, and so nothing is frozen there."""
    if not prefix_sources(student, first):
        told = f"the student runs no layer below layer {first}, the first that is adapted"
        raise DataError(told, where=path, mend="leave the prefix states out")


def prefix_output(path: str | Path) -> Output:
    """The file of prefix states as an output of a command."""
    return Output.file(path, "--prefix_states", holds_prefix, "a run of layers")


def holds_prefix(path: str | Path) -> bool:
    """Whether a file is there and holds boundary activations, of whatever windows."""
    try:
        RunRecord.parse(ActivationReader(path).run, path)
    except PipelineError:
        return False
    return True


def _record(student: Student, sources: Sequence[LayerSource], windows: Windows, compute: Compute) -> RunRecord:
    return RunRecord.start(student.parts()[0], windows, compute.dtype).after(sources, compute)


def _check_same(found: RunRecord, wanted: RunRecord, path: str | Path) -> None:
    """Raise a DataError unless two records are of the same windows, layers and weights; machines may differ."""
    if key := found.other_than(wanted):
        words = {"ids_sha256": "windows", "seqlen": "windows", "config_sha256": "model"}.get(key, key)
        told = f" ({getattr(found, key)}, not {getattr(wanted, key)})" if key in ("dtype", "layers") else ""
        raise DataError(f"the student's states are of other {words}{told}", where=path, mend=_AGAIN)
