"""The sizes of a model, out of its config.json alone: what its memory and its arithmetic follow from.

Imports no torch, so the rules can ask it while the DAG is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from mistral_prune_lora.checkpoints.families import read_config
from mistral_prune_lora.checkpoints.family_tensors import family_tensors
from mistral_prune_lora.layout.partition import MOST_LAYERS

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
_STORED = {"bfloat16": 2, "float16": 2, "float32": 4}

# Hidden and intermediate widths by the most layers: Qwen2-7B's MLP in a Mistral-7B, Mistral-Small-24B, Qwen2-72B,
# Llama-3.1-405B.
_WIDEST = ((32, (4096, 18_944)), (40, (5120, 32_768)), (80, (8192, 29_568)), (MOST_LAYERS, (16_384, 53_248)))


@dataclass(frozen=True)
class Geometry:
    """A dense model's sizes.

    Attributes:
        layers: decoder layers.
        hidden, intermediate: widths of the residual stream and of the MLP.
        queries, keys: widths of what q_proj and k_proj give, heads times head size.
        vocabulary: rows of the embedding.
        tied: whether the head is the embedding.
        itemsize: bytes of a stored number.
        biases: numbers in a layer beside its projections and two norms.
    """

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool = False
    itemsize: int = 2
    biases: int = 0

    @classmethod
    def read(cls, model_dir: str | Path) -> Geometry:
        """Of a dense or A model that is there; weights without a dtype in config.json count as float32.

        Raises:
            CheckpointError: config.json is missing, malformed or of a family that is not taken.
        """
        config = read_config(model_dir)
        tensors = family_tensors(config, Path(model_dir) / "config.json")
        layer, (vocabulary, hidden) = tensors.layer, tensors.head
        return cls(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=layer["mlp.up_proj.weight"][0],
            queries=layer["self_attn.q_proj.weight"][0],
            keys=layer["self_attn.k_proj.weight"][0],
            vocabulary=vocabulary,
            tied=bool(config.get("tie_word_embeddings")),
            itemsize=_STORED.get(str(config.get("dtype") or config.get("torch_dtype")), 4),
            biases=sum(prod(shape) for name, shape in layer.items() if len(shape) == 1) - 2 * hidden,
        )

    @classmethod
    def assumed(cls, num_layers: int) -> Geometry:
        """Of a model that is not fetched yet, by its number of layers: as wide as the widest known one so deep.

        Its vocabulary is Qwen2's, it has as many keys as queries and is stored as float32, so what follows from it is
        not too small. For most models it is too large; the right numbers come once the model is there.
        """
        hidden, inner = next(widths for deepest, widths in _WIDEST if num_layers <= deepest)
        return cls(num_layers, hidden, inner, hidden, hidden, vocabulary=152_064, itemsize=4)

    @property
    def layer_parameters(self) -> int:
        """Numbers in one layer."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden + self.biases

    @property
    def ends_parameters(self) -> int:
        """Numbers in embedding, final norm and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def layer_bytes(self) -> int:
        """Of one layer as it is stored."""
        return self.layer_parameters * self.itemsize

    @property
    def ends_bytes(self) -> int:
        """Of embedding, final norm and head as they are stored."""
        return self.ends_parameters * self.itemsize

    @property
    def largest_tensor_bytes(self) -> int:
        """Of the largest tensor as it is stored: the embedding or an MLP's projection."""
        return max(self.vocabulary, self.intermediate, self.queries) * self.hidden * self.itemsize

    def weights_bytes(self, layers: int | None = None) -> int:
        """Of embedding, norm, head and so many layers as they are stored; None means all layers."""
        return self.ends_bytes + (self.layers if layers is None else layers) * self.layer_bytes
