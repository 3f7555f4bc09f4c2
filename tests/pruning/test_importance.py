"""Angular distances against transformers' own hidden states, and the command that drops the best block."""

import json
import math
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from cut_model import random_windows, save_dense
from safetensors.torch import load_file, save_file
from tiny import save_tokenizer
from transformers import AutoModelForCausalLM, MistralForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.manifest import layout_from_manifest, read_manifest
from mistral_prune_lora.errors import LayoutError, PipelineError
from mistral_prune_lora.models.config import model_config
from mistral_prune_lora.pruning import importance
from mistral_prune_lora.pruning.identity import PassLayer
from mistral_prune_lora.pruning.importance import (
    angular_distances,
    last_token_states,
    write_importance,
)
from mistral_prune_lora.pruning.layeronly_drop import main, parse
from mistral_prune_lora.results.plots import plot_importance
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.memory import working_bytes
from mistral_prune_lora.streaming.passage import embedding_bytes

CPU = Compute.named("cpu", "fp32")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = save_dense(tmp_path_factory.mktemp("importance") / "dense", vocab_size=259)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def states(dense):
    ids = random_windows(5, 24).ids
    return last_token_states(dense, ids, beside=dense.parent / "importance.csv", compute=CPU)


@torch.inference_mode()
def plain_states(dense, ids, dtype, batch_size=1):
    """What transformers hands out of the whole model, a batch at a time; after the last layer before the norm."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
    after_last, batches = [], []
    model.model.norm.register_forward_pre_hook(lambda norm, inputs: after_last.append(inputs[0][:, -1]))
    for batch in ids.long().split(batch_size):
        hidden = model(batch, output_hidden_states=True).hidden_states[:-1]
        batches.append(torch.stack([*(state[:, -1] for state in hidden), after_last.pop()]))
    return torch.cat(batches, 1).float()


@pytest.mark.parametrize("config", [{}, {"family": "qwen3", "use_sliding_window": True, "sliding_window": 9}])
@pytest.mark.parametrize(("dtype", "batch_size"), [(torch.float32, 1), (torch.float32, 4), (torch.bfloat16, 2)])
def test_streamed_states_have_the_bits_of_the_whole_model_s(tmp_path, config, dtype, batch_size):
    dense, ids = save_dense(tmp_path / "dense", max_window_layers=4, **config), random_windows(5, 24).ids
    compute, beside = Compute(torch.device("cpu"), dtype, batch_size), tmp_path / "out/importance.csv"
    expected = plain_states(dense, ids, dtype, batch_size)
    assert torch.equal(last_token_states(dense, ids, beside=beside, compute=compute), expected)
    # Three layers at a time, their hidden states in files between two groups.
    layer = LayerSource(0, open_checkpoint(dense)).nbytes(dtype)
    config, model = model_config(open_checkpoint(dense)), open_checkpoint(dense)
    small = working_bytes(compute, config, 24) + embedding_bytes(model, compute) + 3 * layer
    assert torch.equal(
        last_token_states(dense, ids, beside=beside, compute=replace(compute, max_memory=small)), expected
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(PipelineError, match="one layer, its hidden states"):
        less = replace(compute, max_memory=small - 2 * layer - 1)
        last_token_states(dense, ids, beside=beside, compute=less)


def test_no_more_layers_are_in_memory_than_fit_and_files_are_gone_when_they_were_read(dense, tmp_path, monkeypatch):
    seen, resident = [], importance.Backbone.resident

    def watching(self, groups):
        for group in resident(self, groups):
            files = [file for file in tmp_path.rglob("*.safetensors")]
            seen.append((len(group), sum(not isinstance(layer, PassLayer) for layer in self._model.layers), len(files)))
            yield group

    monkeypatch.setattr(importance.Backbone, "resident", watching)
    monkeypatch.setattr(importance, "resident_groups", lambda layers, *_: [layers[:3], layers[3:6], layers[6:]])
    last_token_states(dense, random_windows(3, 16).ids, beside=tmp_path / "importance.csv", compute=CPU)
    assert seen == [(3, 3, 0), (3, 3, 1), (2, 2, 1)]


def test_a_model_that_overflows_is_not_ranked(dense, tmp_path):
    """Of NaN, no cosine would be known, and the distance taken for zero."""
    spoilt = shutil.copytree(dense, tmp_path / "spoilt")
    weights = load_file(spoilt / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PipelineError, match="the hidden states that leave layer 2 hold NaN or infinity"):
        last_token_states(spoilt, random_windows(1, 8).ids, beside=tmp_path / "importance.csv", compute=CPU)
    assert [p.name for p in tmp_path.iterdir()] == ["spoilt"]


def test_what_a_killed_ranking_left_is_removed_by_the_next(dense, tmp_path):
    """A process id that is not in use: those of 64-bit Linux end at 2^22."""
    left = tmp_path / f".importance.csv.new-{1 << 22}-x"
    left.mkdir()
    (left / "2.safetensors").write_text("half")
    last_token_states(dense, random_windows(1, 8).ids, beside=tmp_path / "importance.csv", compute=CPU)
    assert not left.exists()


def test_distances_are_those_of_the_models_own_hidden_states(dense, states):
    model = MistralForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.inference_mode():
        hidden = model(random_windows(5, 24).ids.long(), output_hidden_states=True).hidden_states
    table = angular_distances(states, 3, keep_last_layer=True)
    assert table.start.tolist() == [0, 1, 2, 3, 4] and table.end.tolist() == [2, 3, 4, 5, 6]
    for row in table.itertuples():
        before, after = hidden[row.start][:, -1].double(), hidden[row.start + 3][:, -1].double()
        cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in zip(before, after, strict=True)]
        assert row.angular_distance == pytest.approx(math.acos(sum(cosines) / 5) / math.pi, rel=1e-4)
    best = table.loc[table.angular_distance.idxmin()]
    assert best["rank"] == 1 and table.recommended.tolist() == (table["rank"] == 1).tolist()
    assert sorted(table["rank"]) == [1, 2, 3, 4, 5]


def test_the_last_layer_is_a_candidate_only_if_it_may_go(states):
    assert angular_distances(states, 3, keep_last_layer=False).end.tolist()[-1] == 7
    assert angular_distances(states, 7, keep_last_layer=True).start.tolist() == [0]
    for block in (0, 8):
        with pytest.raises(LayoutError, match="no block"):
            angular_distances(states, block)


def original_starts(layers, block, keep_last_layer):
    """Where the original script lets a block begin: it wants the input of the layer after the block."""
    end = layers - block - (1 if keep_last_layer else 0)
    return [start for start in range(end) if start + block < layers]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("block", [1, 3, 6])
def test_candidates_are_all_blocks_or_those_of_the_original_script(states, block, keep):
    every = angular_distances(states, block, keep_last_layer=keep)
    assert every.start.tolist() == list(range(8 - block if keep else 8 - block + 1))
    original = angular_distances(states, block, keep_last_layer=keep, all_blocks=False)
    assert original.start.tolist() == original_starts(8, block, keep)
    assert original.angular_distance.tolist() == every.angular_distance.tolist()[:-1]


def test_a_block_that_leaves_no_candidate_is_refused(states):
    with pytest.raises(LayoutError, match="no block of 7 layers"):
        angular_distances(states, 7, all_blocks=False)


def test_a_block_of_one_layer_is_cs(states):
    table = angular_distances(states, 1)
    assert set(table.B) == {""} and table.C[4] == "4"


REQUIRED = ["--model", "dense", "--save_dir", "A", "--save_removed_dir", "bundles"]


def test_the_preset_searches_as_the_original_script_and_flags_go_before_it():
    wanted = {
        "dataset": "c4",
        "nsamples": 64,
        "seqlen": 1024,
        "dtype": "fp16",
        "drop_frac": 0.3,
        "keep_last_layer": False,
    }
    wanted |= {"candidates": "original", "split_policy": "half", "split_ratio": 0.5, "seed": 0}
    given = vars(parse([*REQUIRED, "--preset", "original"]))
    assert {key: given[key] for key in wanted} == wanted
    flags = ["--drop_frac", "0.25", "--seqlen", "2048", "--dataset", "wikitext2"]
    for words in ([*flags, "--preset", "original"], ["--preset", "original", *flags]):
        given = vars(parse([*REQUIRED, *words]))
        changed = {"drop_frac": 0.25, "seqlen": 2048, "dataset": "wikitext2"}
        assert {key: given[key] for key in wanted} == wanted | changed
    ours = vars(parse(REQUIRED))
    assert ours["candidates"] == "all" and ours["dtype"] == "bf16" and ours["nsamples"] == 128


def test_the_preset_as_a_command(dense, tmp_path):
    flags = ("--preset", "original", "--drop_frac", "0.4")
    assert main(arguments(dense, tmp_path, *flags)) == 0
    log = json.loads((tmp_path / "A/prune_log.json").read_text())
    assert log["settings"]["preset"] == log["settings"]["candidates"] == "original" and log["drop_frac"] == 0.4
    assert [block["start"] for block in log["blocks"]] == original_starts(8, 3, False)
    assert log["split"]["B"] == log["selected_block"]["indices"][:1]


def test_the_ranking_as_files(states, tmp_path):
    table = angular_distances(states, 4)
    write_importance(table, tmp_path / "importance.csv")
    read = pd.read_csv(tmp_path / "importance.csv")
    assert read.columns.tolist() == ["start", "end", "angular_distance", "rank", "recommended", "B", "C"]
    assert read.B[0] == "0 1" and read.C[0] == "2 3"
    plot_importance(tmp_path / "importance.csv", tmp_path / "importance.svg")
    plot_importance(tmp_path / "importance.csv", tmp_path / "again.svg")
    assert (tmp_path / "importance.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def arguments(dense, folder, *more):
    text = folder / "calibration.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return [
        "--model", str(dense), "--device", "cpu", "--dtype", "fp32", "--text_file", str(text), "--nsamples", "6",
        "--seed", "3", "--seqlen", "24", "--save_dir", str(folder / "A"), "--save_removed_dir",
        str(folder / "bundles"), *more,
    ]  # fmt: skip


def test_the_command_drops_the_block_that_it_measures_as_best(dense, tmp_path, capsys, monkeypatch):
    looked_at, measure = [], importance.last_token_states
    monkeypatch.setattr(
        importance, "last_token_states", lambda *a, **k: (looked_at.append((len(a[1]), k)), measure(*a, **k))[1]
    )
    flags = ("--drop_frac", "0.4", "--keep_last_layer", "--max_batches", "4", "--prune_log", str(tmp_path / "log.json"))
    flags = (*flags, "--batch_size", "3", "--max_memory", "1GB")
    assert main(arguments(dense, tmp_path, *flags, "--split_policy", "ratio", "--split_ratio", "0.7")) == 0
    manifest, log = read_manifest(tmp_path / "A"), json.loads((tmp_path / "log.json").read_text())
    blocks = {b["start"]: b for b in log["blocks"]}
    best = min(blocks.values(), key=lambda b: b["angular_distance"])
    assert manifest["selection"] == {
        "method": "angular_distance", "block": {"start": best["start"], "n": 3},
        "angular_distance": pytest.approx(best["angular_distance"]), "keep_last_layer": True,
    }  # fmt: skip
    assert set(blocks) == {0, 1, 2, 3, 4}
    layout = layout_from_manifest(manifest)
    assert layout.dropped == tuple(range(best["start"], best["start"] + 3)) and len(layout.b) == 2
    assert log == json.loads((tmp_path / "A/prune_log.json").read_text())
    assert log["seed"] == 3 and log["settings"]["max_batches"] == 4
    (count, how), *_ = looked_at
    assert (count, how["compute"].batch_size, how["compute"].max_memory) == (4, 3, 10**9)
    assert f"B holds {list(layout.b)}" in capsys.readouterr().out


def test_the_command_takes_layers_as_they_are_given(dense, tmp_path):
    assert main(arguments(dense, tmp_path, "--b_layers", "6", "2", "--c_layers", "4")) == 0
    manifest = read_manifest(tmp_path / "A")
    assert layout_from_manifest(manifest).b == (2, 6) and manifest["selection"]["method"] == "fixed"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--drop_frac", "0"), "0.0 of 8 layers are 0 layers"),
        (("--drop_frac", "1"), "1.0 of 8 layers are 8 layers"),
        (("--b_layers", "8"), "layers [8] do not exist"),
        (("--device", "cuda:7"), "--device cpu"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(dense, tmp_path, capsys, flags, told):
    assert main(arguments(dense, tmp_path, *flags)) == 1
    errors = capsys.readouterr().err.splitlines()
    assert told in next(line for line in errors if line.startswith("error: "))
    assert not (tmp_path / "A").exists() and not (tmp_path / "bundles").exists()
