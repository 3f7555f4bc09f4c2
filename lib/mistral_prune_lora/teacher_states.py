"""The dense model's final hidden states of the training windows, made once for all adapters, layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch

from mistral_prune_lora.checkpoint import open_checkpoint
from mistral_prune_lora.device import resolve_device
from mistral_prune_lora.evaluation_runs import Ending, Start, run_to_file
from mistral_prune_lora.layers import Compute, LayerSource, build_norm
from mistral_prune_lora.model import model_config
from mistral_prune_lora.teacher_record import teacher_record, weight_digests
from mistral_prune_lora.windows import Windows


def teacher_states(
    teacher_dir: str | Path,
    windows: Windows,
    output: str | Path,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    batch_size: int = 1,
    max_memory: int | None = None,
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

    Raises:
        CheckpointError: weights are missing or do not fit.
        PipelineError: memory or disk space does not suffice, or another process is writing `output`.
    """
    compute = Compute(resolve_device(device), dtype, batch_size, max_memory)
    teacher = open_checkpoint(teacher_dir)
    config = model_config(teacher)
    norm = build_norm(config, teacher, dtype, compute.device)
    # With the batch size, since a run that goes on must cut the same batches.
    record = teacher_record(windows, weight_digests(teacher_dir)) | {"batch_size": batch_size}
    layers = [LayerSource(index, teacher) for index in range(config.num_hidden_layers)]
    start = Start(teacher, windows, compute, None)
    run_to_file(start, layers, windows, config, compute, Path(output), Ending(norm, record))
