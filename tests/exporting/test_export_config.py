"""The configuration of a stage: what is said layer by layer is cut, what goes by layer numbers is written out first."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.exporting.config import stage_config
from mistral_prune_lora.pruning.identity import PassLayer

LAYERS = (0, 2, 3, 7)


def model(**changes) -> Checkpoint:
    """A checkpoint without weights: its configuration is all that is asked for."""
    return Checkpoint(Path("A"), "model", {}, {**tiny_config().to_diff_dict(), "num_hidden_layers": 8, **changes})


def cut(layers=LAYERS, **changes):
    return stage_config(model(**changes), layers, tied=False, dtypes=["BF16"])


def test_every_list_with_an_entry_a_layer_is_cut_nested_ones_too():
    letters = list("abcdefgh")
    done = cut(
        mlp_layer_types=letters,
        no_rope_layers=[1, 0] * 4,
        attention={"windows": letters, "sinks": [1, 2, 3], "deep": {"er": letters}},
        eos_token_id=list(range(8)),
        head_dim=16,  # a factor for each pair of its dimensions
        rope_scaling={"rope_type": "longrope", "short_factor": list(range(1, 9)), "long_factor": list(range(1, 9))},
    )
    assert done.content["mlp_layer_types"] == done.content["attention"]["windows"] == ["a", "c", "d", "h"]
    assert done.content["attention"] == {"windows": list("acdh"), "sinks": [1, 2, 3], "deep": {"er": list("acdh")}}
    assert done.content["no_rope_layers"] == [1, 1, 0, 0]
    # As many as there are layers by chance only.
    assert done.content["eos_token_id"] == list(range(8))
    assert done.content["rope_scaling"]["short_factor"] == list(range(1, 9))
    assert sorted(done.cut) == ["attention.deep.er", "attention.windows", "mlp_layer_types", "no_rope_layers"]
    assert done.written_out == () and done.content["num_hidden_layers"] == 4


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("layers", [LAYERS, (4, 5, 6), (0, 1), tuple(range(8))])
def test_layer_types_that_transformers_works_out_from_numbers_are_written_out(tmp_path, explicit, layers):
    """Qwen2: layers from max_window_layers on have a sliding window. The stage is the model with others passed by."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, use_sliding_window=True, sliding_window=4, max_window_layers=4,
    )  # fmt: skip
    dense = Qwen2ForCausalLM(config).eval()
    dense.save_pretrained(tmp_path)
    there = json.loads((tmp_path / "config.json").read_text())
    if not explicit:
        del there["layer_types"]
        (tmp_path / "config.json").write_text(json.dumps(there))
    done = stage_config(open_checkpoint(tmp_path), layers, tied=False, dtypes=["F32"])
    types = ["sliding_attention" if layer >= 4 else "full_attention" for layer in layers]
    assert done.content["layer_types"] == types
    assert done.written_out == (() if explicit else ("layer_types",))
    # Who works it out by number comes to the same.
    assert [i >= done.content["max_window_layers"] for i in range(len(layers))] == [layer >= 4 for layer in layers]

    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/config.json").write_text(json.dumps(done.content))
    stage = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "stage")).eval()
    assert type(stage).__name__ == "Qwen2ForCausalLM" == done.content["architectures"][0]
    stage.load_state_dict(
        {
            re.sub(r"layers\.(\d+)", lambda m: f"layers.{layers.index(int(m[1]))}", name): tensor
            for name, tensor in dense.state_dict().items()
            if "layers." not in name or int(name.split(".")[2]) in layers
        }
    )
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = dense(ids).logits
        for layer in set(range(8)) - set(layers):
            dense.model.layers[layer] = PassLayer(layer)
        assert torch.equal(stage(ids).logits, dense(ids).logits)
        assert len(layers) == 8 or not torch.equal(stage(ids).logits, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_layer_interval": 4}, "no_rope_layer_interval goes by layer numbers"),
        ({"no_rope_layer_interval": 4, "no_rope_layers": [1] * 7}, "no_rope_layers has 7 entries, and .* 8 layers"),
        ({"sliding_window_pattern": 6}, "sliding_window_pattern goes by layer numbers"),
        ({"scale_depth": 1.4}, "scale_depth lets layers depend on their number"),
        ({"moe_layers": [1, 3, 5]}, "moe_layers has 3 entries"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types has 4 entries"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        cut(**changes)


def test_an_interval_gives_way_to_the_list_that_says_the_same():
    done = cut(no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 2)
    assert done.content["no_rope_layers"] == [1, 1, 0, 0] and "no_rope_layer_interval" not in done.content


def test_all_layers_keep_what_goes_by_their_number():
    done = cut(tuple(range(8)), no_rope_layer_interval=4, scale_depth=1.4, moe_layers=[1, 3])
    assert done.content["no_rope_layer_interval"] == 4 and done.content["moe_layers"] == [1, 3]


def test_a_scaled_rotary_embedding_has_its_older_names_too():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 128
    done = cut(model_type="llama", rope_parameters={**rope, "rope_theta": 500.0})
    assert done.content["rope_theta"] == 500.0 and done.content["rope_scaling"] == rope
    # And transformers 5, which reads both, still reads the same.
    again = AutoConfig.for_model(**done.content)
    assert again.rope_parameters == {**rope, "rope_theta": 500.0}
    older = cut(model_type="llama", rope_parameters=None, rope_theta=500.0, rope_scaling=rope)
    assert (older.content["rope_theta"], older.content["rope_scaling"]) == (500.0, rope)


def test_one_dtype_is_written_down_two_are_not():
    assert cut(dtype="float16").content["dtype"] == "bfloat16"
    both = stage_config(model(dtype="float16"), LAYERS, tied=True, dtypes=["BF16", "F32"]).content
    assert both["dtype"] == "float16" and "torch_dtype" not in both and both["tie_word_embeddings"] is True
