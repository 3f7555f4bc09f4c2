"""The dense model's final hidden states of the training windows, made once for all adapters, layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.device import resolve_device
from mistral_prune_lora.distillation.teacher_record import teacher_record, weight_digests
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.evaluation.runs import Ending, Start, run_to_file
from mistral_prune_lora.models.load import model_config
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.storage.outputs import Output, claim
from mistral_prune_lora.streaming.layers import Compute, LayerSource, build_norm
from mistral_prune_lora.text.windows import Windows


def teacher_states(
    teacher_dir: str | Path,
    windows: Windows,
    output: str | Path,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    batch_size: int = 1,
    max_memory: int | None = None,
    overwrite: bool = False,
) -> None:
    """Run the dense model over the training windows once and keep its final hidden states (after the norm).

    As many layers are in memory as may be, and never all of them have to. A killed run is continued from its last
    finished batch.

    Args:
        teacher_dir: the dense model.
        windows: the training windows.
        output: a file of activations, see activations.py, in `dtype`; its record names the token ids and the teacher,
            which are checked when it is read.
        dtype, device, batch_size: of the teacher's forward pass.
        max_memory: bytes to use on the device; None means a share of what is free.
        overwrite: replace what holds no such states, too; never the teacher.

    Raises:
        CheckpointError: weights are missing or do not fit.
        PipelineError: the output may not be written, see `outputs.claim`; memory or disk space does not suffice,
            another process is writing `output`, or the model overflows.
    """
    claim([states_output(output)], [teacher_dir], overwrite=overwrite)
    compute = Compute(resolve_device(device), dtype, batch_size, max_memory)
    teacher = open_checkpoint(teacher_dir)
    config = model_config(teacher)
    norm = build_norm(config, teacher, dtype, compute.device)
    # With the batch size, since a run that goes on must cut the same batches.
    record = teacher_record(windows, weight_digests(teacher_dir)) | {"batch_size": batch_size}
    layers = [LayerSource(index, teacher) for index in range(config.num_hidden_layers)]
    start = Start(teacher, windows, compute, None)
    run_to_file(start, layers, windows, config, compute, Path(output), Ending(norm, record))


def states_output(path: str | Path) -> Output:
    """The file of the teacher's states as an output of a command."""
    return Output.file(path, "--teacher_states", holds_states, "the teacher's run")


def holds_states(path: str | Path) -> bool:
    """Whether a file is there and holds a teacher's states, of whatever windows."""
    try:
        return "teacher" in ActivationReader(path).run
    except PipelineError:
        return False
