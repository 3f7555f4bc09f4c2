"""Which block of layers changes its input least: angular distances of every block that could be dropped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.choosing.proxies import angle
from mistral_prune_lora.console import progress
from mistral_prune_lora.errors import LayoutError, PipelineError
from mistral_prune_lora.models.config import model_config
from mistral_prune_lora.models.ends import Embedding, check_ids
from mistral_prune_lora.pruning.cut import split_block
from mistral_prune_lora.storage.activations import ActivationReader
from mistral_prune_lora.storage.finite import all_finite
from mistral_prune_lora.storage.transaction import atomic_file, scratch_directory
from mistral_prune_lora.streaming.backbone import Backbone
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.memory import resident_groups
from mistral_prune_lora.streaming.passage import embedding_bytes
from mistral_prune_lora.streaming.run import KeptActivations, run_batches

if TYPE_CHECKING:
    import pandas as pd  # at run time where tables are made: the start of the process needs none


def last_token_states(
    model_dir: str | Path, ids: torch.Tensor, *, beside: str | Path, compute: Compute
) -> torch.Tensor:
    """The hidden state of each window's last token before every layer and after the last.

    Layers are streamed: as many are in memory as may be, and never all of them have to. Where they go in several
    groups, the windows' hidden states lie in files between two of them.

    Args:
        model_dir: the dense model.
        ids: calibration windows, integers, shape (windows, seqlen).
        beside: what is being made of the result; those files lie beside it while this runs.
        compute: of the forward pass.

    Returns:
        float32, shape (layers + 1, windows, hidden), on the CPU; before the final norm.

    Raises:
        CheckpointError: weights are missing, do not fit, or are not what their record says was written.
        DataError: an id that the model has no embedding for.
        PipelineError: memory or disk space does not suffice; the model overflows.
    """
    model = open_checkpoint(model_dir)
    check_ids(model, ids)
    model.check_tensors(model.entries.values())
    config, embedding = model_config(model), Embedding(model, compute.dtype)
    layers = [LayerSource(index, model) for index in range(config.num_hidden_layers)]
    seen = _LastTokens(torch.empty(len(layers) + 1, len(ids), config.hidden_size), compute.batch_size)
    # What is on the CPU in any case takes memory from the layers only if these are there too.
    kept = seen.states.nbytes if compute.device.type == "cpu" else 0
    groups = resident_groups(layers, compute, config, ids.shape[1], embedding_bytes(model, compute) + kept)
    seen(0, -1, embedding(ids[:, -1:]))
    backbone, shape = Backbone(config, compute), (*ids.shape, config.hidden_size)
    with (
        scratch_directory(beside) as scratch,
        progress(total=ids.numel() * len(groups), description="calibrate", unit="tok", unit_scale=True) as bar,
    ):
        read, former = lambda first, last: embedding(ids[first:last]), None
        for group in backbone.resident(groups):
            if group is groups[-1]:
                run_batches(backbone, read, len(ids), _Nothing(), bar, seen)
                break
            between_groups = scratch / f"{group[-1].index}.safetensors"
            with KeptActivations(between_groups, shape, compute, {}) as between:
                run_batches(backbone, read, len(ids), between, bar, seen)
                between.finish()
            if former:
                former.unlink()
            read, former = ActivationReader(between_groups).read, between_groups
    return seen.states


class _LastTokens:
    """Collects the last token's hidden states.

    Attributes:
        states: float32, shape (layers + 1, windows, hidden); row i + 1 is what leaves layer i.
    """

    def __init__(self, states: torch.Tensor, batch_size: int) -> None:
        self.states, self._batch_size = states, batch_size

    def __call__(self, batch: int, layer: int, hidden: torch.Tensor) -> None:
        """Take what leaves a layer, shape (n, tokens, hidden).

        Raises:
            PipelineError: NaN or infinity, which would be ranked as no change at all.
        """
        last, first = hidden[:, -1].float().cpu(), batch * self._batch_size
        if not all_finite(last):
            raise PipelineError(
                f"the hidden states that leave layer {layer} hold NaN or infinity",
                where="--dtype",
                mend="use bf16 or fp32, whose range is wider than that of fp16; if that is no help, check the weights",
            )
        self.states[layer + 1, first : first + len(hidden)] = last


class _Nothing:
    """A sink for hidden states that nobody needs any more."""

    done: frozenset[int] = frozenset()

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Let them go."""

    def flush(self) -> None:
        """Nothing is on its way."""

    def status(self) -> str:
        """Nothing to say."""
        return ""


def angular_distances(
    states: torch.Tensor, block: int, *, keep_last_layer: bool = True, all_blocks: bool = True
) -> pd.DataFrame:
    """The angular distance between what enters and what leaves every legal block of consecutive layers.

    distance = arccos(mean over windows of the cosine) / pi, at the last token, after Gromov et al. 2024
    (https://arxiv.org/abs/2403.17887, section 3.2), who average the angles where this averages the cosines.

    Args:
        states: as `last_token_states` gives them.
        block: layers in a block.
        keep_last_layer: leave out blocks that hold the last layer.
        all_blocks: of L layers, block starts are 0 to L - block, and to L - block - 1 with `keep_last_layer`. False
            leaves the last of them out: the original scripts measure what leaves a block as the input of the layer
            after it, which the last block has not, and take one more from the end with `keep_last_layer`.

    Returns:
        One row a block, by start: start, end (inclusive), angular_distance, rank (1 is the smallest), recommended,
        B and C (the layers each would hold with the block split in half).

    Raises:
        LayoutError: no block of that size is legal.
    """
    import pandas as pd

    count = len(states) - 1
    starts = range(count - block + 1 - keep_last_layer - (not all_blocks))
    if block < 1 or not starts:
        raise LayoutError(
            f"no block of {block} layers can be dropped from {count}", mend="drop fewer layers, at least one"
        )
    states = states.double()
    rows = []
    for start in starts:
        cosine = torch.nn.functional.cosine_similarity(states[start], states[start + block], dim=-1).mean().item()
        b, c = split_block(start, block)
        distance = angle(cosine)
        rows.append((start, start + block - 1, distance, " ".join(map(str, b)), " ".join(map(str, c))))
    table = pd.DataFrame(rows, columns=["start", "end", "angular_distance", "B", "C"])
    table.insert(3, "rank", table.angular_distance.rank(method="first").astype(int))
    table.insert(4, "recommended", table["rank"] == 1)
    return table


def write_importance(table: pd.DataFrame, output: str | Path) -> None:
    """Write a ranking as CSV, whole or not at all."""
    with atomic_file(output) as fresh:
        table.to_csv(fresh, index=False)
