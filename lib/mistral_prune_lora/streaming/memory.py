"""How many layers are in memory at once: consecutive ones that fit together, beside what their forward pass holds."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.sizes import size_text
from mistral_prune_lora.streaming.compute import Compute, LayerSource


def resident_groups(
    sources: Sequence[LayerSource],
    compute: Compute,
    config: PreTrainedConfig,
    seqlen: int,
    reserved: int = 0,
    documents_apart: bool = False,
) -> list[list[LayerSource]]:
    """Consecutive layers that fit into memory together, in order.

    Args:
        sources: the layers to run, in order.
        compute: gives budget, dtype and batch size.
        config: the model's geometry.
        seqlen: token ids in a window.
        reserved: bytes that something else on the device takes, such as the head.
        documents_apart: as for `working_bytes`.

    Raises:
        PipelineError: not even one layer fits.
    """
    sizes = [source.nbytes(compute.dtype) for source in sources]
    memory, beside = compute.memory, reserved + working_bytes(compute, config, seqlen, documents_apart=documents_apart)
    # On a GPU the next group is copied while one computes.
    copies = 2 if compute.copies_meanwhile and sum(sizes) > memory - beside else 1
    budget = (memory - beside) // copies
    if sizes and max(sizes) > budget:
        raise PipelineError(
            f"one layer, its hidden states and the head do not fit into {size_text(memory)}",
            where="--max_memory",
            mend=f"Allow {size_text(beside + copies * max(sizes))} or more, or use a smaller batch or dtype",
        )
    groups: list[list[LayerSource]] = []
    used = 0
    for source, size in zip(sources, sizes, strict=True):
        if not groups or used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(source)
        used += size
    return groups


def working_bytes(compute: Compute, config: PreTrainedConfig, seqlen: int, *, documents_apart: bool = False) -> int:
    """An upper estimate of what one layer's forward pass holds beside its weights, attention scores included.

    With documents kept apart, every window has an attention mask of its own.
    """
    tokens = compute.batch_size * seqlen
    width = 8 * config.hidden_size + 3 * config.intermediate_size
    sliding = getattr(config, "sliding_window", None)
    masks = compute.batch_size if documents_apart else 1 if sliding else 0
    # What is masked goes another way, and a window that reaches over all tokens masks nothing.
    masked = documents_apart or (sliding and seqlen > sliding)
    scores = 0 if masked else _score_bytes(compute, config, seqlen)
    return tokens * width * max(4, compute.dtype.itemsize) + masks * seqlen * seqlen + scores


def _score_bytes(compute: Compute, config: PreTrainedConfig, seqlen: int) -> int:
    """What attention holds of the scores of all tokens beside all others; 0 where it goes through them in blocks.

    On a GPU, torch's kernels that do so take keys and values of fewer heads than the queries in 16 bits alone. In
    float32 it falls back on plain products: scores, a softmax of them, and what sees to rows without any score.
    """
    heads = config.num_attention_heads
    if compute.device.type != "cuda" or compute.dtype.itemsize < 4 or config.num_key_value_heads == heads:
        return 0
    return 4 * compute.batch_size * heads * seqlen * seqlen * compute.dtype.itemsize
