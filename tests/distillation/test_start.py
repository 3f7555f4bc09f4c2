"""A training that starts from an adapter: the same updates as on merged weights, and one adapter that holds both."""

import json

import pytest
import torch
from cut_model import cut, random_windows, save_dense
from merge_oracle import peft_merged, random_adapter, read_result
from safetensors.torch import load_file
from tiny import save_tokenizer
from training_jobs import train_job

from mistral_prune_lora.distillation.settings import LoraSettings, OptimiserSettings
from mistral_prune_lora.errors import AdapterError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.pruning.mistral_merge_adapter import main as merge

LAYOUT = Layout(6, (2,), (3,))
QUICK = OptimiserSettings(steps=3, batch_size=2, gradient_accumulation=1, learning_rate=1e-2, warmup_steps=1)


@pytest.fixture
def parts(tmp_path):
    dense = save_dense(tmp_path / "dense", dtype=torch.float32, num_hidden_layers=6)
    a, _ = cut(dense, LAYOUT, tmp_path, torch.float32)
    save_tokenizer(a)
    return dense, a


def start_adapter(folder, a, seed=0):
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["down_proj"], "layers_to_transform": [1]}
    return random_adapter(folder, a, {**settings, "task_type": "CAUSAL_LM"}, seed=seed)


def train(parts, output, student=None, **changes):
    settings = {"lora": LoraSettings(rank=2, alpha=4), "optimiser": QUICK, "dtype": torch.float32}
    train_job(
        "A", student_dir=student or parts[1], teacher_dir=parts[0], windows=random_windows(6, 16), output_dir=output,
        **{**settings, **changes},
    )  # fmt: skip
    return output


@pytest.mark.parametrize("rslora", [False, True])
def test_it_trains_as_on_merged_weights_and_writes_one_adapter_that_does_both(parts, tmp_path, rslora):
    start = start_adapter(tmp_path / "start", parts[1])
    merged = tmp_path / "merged"
    assert not merge(["--base_model", str(parts[1]), "--adapter_path", str(start), "--output_dir", str(merged)])
    lora = LoraSettings(rank=2, alpha=4, use_rslora=rslora)
    joined = train(parts, tmp_path / "joined", start=start, lora=lora)
    plain = train(parts, tmp_path / "plain", student=merged, lora=lora)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (joined, plain))
    begun = load_file(start / "adapter_model.safetensors")
    rank = next(tensor for name, tensor in begun.items() if "lora_A" in name).shape[0]
    for name, tensor in theirs.items():
        held = ours[name][:2] if "lora_A" in name else ours[name][:, :2]
        assert torch.equal(held, tensor), name
        assert (ours[name].numel() > tensor.numel()) == ("layers.1.mlp.down_proj" in name)
    config = json.loads((joined / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"model.layers.1.mlp.down_proj": 2 + rank}
    by_peft, twice = (peft_merged(parts[1], each, torch.float32) for each in ([joined], [start, plain]))
    for name in read_result(parts[1]):  # PEFT's model has random weights where layers were dropped
        torch.testing.assert_close(by_peft[name], twice[name], rtol=1e-5, atol=1e-6)
    told = json.loads((joined / "training.json").read_text())["start"]
    assert told["dir"] == str(start) and len(told["weights_sha256"]) == 64
    assert f"| started from | {start} |" in (joined / "README.md").read_text()


def test_the_curve_begins_where_the_start_stands(parts, tmp_path):
    start = start_adapter(tmp_path / "start", parts[1])
    held = {"held_out_windows": random_windows(2, 16, seed=9)}
    first = train(parts, tmp_path / "with", start=start, **held)
    second = train(parts, tmp_path / "without", **held)
    looks = [(folder / "held_out.csv").read_text().splitlines()[1] for folder in (first, second)]
    assert looks[0] != looks[1]


def test_what_the_training_leaves_alone_cannot_be_started_from(parts, tmp_path):
    start = start_adapter(tmp_path / "start", parts[1])
    refused = [
        ({"adapt_layers": (4, 5)}, "does not adapt"),
        ({"lora": LoraSettings(rank=2, target_modules=("q_proj",))}, "does not adapt"),
        ({"lora": LoraSettings(rank=2, rank_pattern={"mlp.*": 4})}, "a pattern sets"),
        ({"lora": LoraSettings(rank=2, use_dora=True)}, "DoRA"),
    ]
    for changes, told in refused:
        with pytest.raises(AdapterError, match=told):
            train(parts, tmp_path / "output", start=start, **changes)
    other = save_dense(tmp_path / "other", dtype=torch.float32, num_hidden_layers=6, intermediate_size=96)
    foreign = start_adapter(tmp_path / "foreign", other)
    with pytest.raises(AdapterError, match="and the adapter is for"):
        train(parts, tmp_path / "output", start=foreign)
    assert not (tmp_path / "output").exists()


def test_another_start_is_another_training(parts, tmp_path, capsys):
    """A state that a killed run left is not gone on with from another adapter."""
    starts = [start_adapter(tmp_path / f"start{seed}", parts[1], seed=seed) for seed in (1, 2)]

    class Ended(Exception):
        pass

    def kill(*_):
        raise Ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mistral_prune_lora.distillation.train.write_adapter", kill)
        with pytest.raises(Ended):
            train(parts, tmp_path / "output", start=starts[0], save_steps=1)
    train(parts, tmp_path / "output", start=starts[1])
    assert "of a training with another start" in capsys.readouterr().err
