"""The dense model's final hidden states of the training windows, made once for all adapters, layer by layer."""

from __future__ import annotations

from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.distillation.teacher_record import teacher_record
from mistral_prune_lora.errors import DataError, PipelineError
from mistral_prune_lora.models.ends import build_norm
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.storage.outputs import Output, claim
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.streaming.run import KeptActivations, run_layers
from mistral_prune_lora.streaming.shards import Shard
from mistral_prune_lora.text.windows import Windows


def teacher_states(
    teacher_dir: str | Path,
    windows: Windows,
    output: str | Path,
    *,
    compute: Compute,
    layer: int | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
) -> None:
    """Run the dense model over the training windows once and keep its hidden states.

    As many layers are in memory as may be, and never all of them have to. A killed run is continued from its last
    finished batch.

    Args:
        teacher_dir: the dense model.
        windows: the training windows.
        output: a file of activations, see activations.py, in the compute dtype; its record names the token ids and the
            teacher, which are checked when it is read.
        compute: of the teacher's forward pass.
        layer: keep what leaves this layer; None keeps the final hidden states, after the norm.
        overwrite: replace what holds no such states, too; never the teacher.
        shard: which of the windows; None takes all.

    Raises:
        CheckpointError: weights are missing or do not fit.
        DataError: a token id that the teacher has no embedding for; a layer that it does not have.
        PipelineError: the output may not be written, see `outputs.claim`; memory or disk space does not suffice,
            another process is writing `output`, or the model overflows.
    """
    claim([states_output(output)], [teacher_dir], overwrite=overwrite)
    teacher = open_checkpoint(teacher_dir)
    passage = Passage(teacher, windows, compute).shard(shard)
    count = passage.config.num_hidden_layers
    if layer is not None and layer >= count:
        raise DataError(
            f"layer {layer} is not there, the teacher has {count}",
            where="hidden.teacher_layer",
            mend=f"name one of 0 to {count - 1}",
        )
    change = build_norm(passage.config, teacher, compute.dtype, compute.device) if layer is None else None
    # With the batch size, since a run that goes on must cut the same batches.
    record = teacher_record(passage.windows, teacher_dir) | {"batch_size": compute.batch_size}
    record |= {} if layer is None else {"layer": layer}
    layers = [LayerSource(index, teacher) for index in range(count if layer is None else layer + 1)]
    with KeptActivations(output, passage.shape, compute, record, change=change) as states:
        run_layers(passage, passage.origin(None), layers, states)
        states.finish()


def states_output(path: str | Path) -> Output:
    """The file of the teacher's states as an output of a command."""
    return Output.file(path, "--teacher_states", holds_states, "the teacher's run")


def holds_states(path: str | Path) -> bool:
    """Whether a file is there and holds a teacher's states, of whatever windows."""
    try:
        return "teacher" in ActivationReader(path).run
    except PipelineError:
        return False
