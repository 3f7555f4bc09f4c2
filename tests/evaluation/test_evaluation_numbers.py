"""NaN and infinity in weights, hidden states and scores end an evaluation with a line that says whose they are."""

import json
import math
import shutil

import pytest
import torch
from cut_model import cut, random_windows, save_dense
from evaluation_jobs import score_job, segment_job
from evaluation_project import LAYOUT, evaluate
from safetensors.torch import load_file, save_file
from tiny import save_tokenizer

from mistral_prune_lora.errors import CheckpointError, NumberError
from mistral_prune_lora.evaluation.scoring import DenseAnswers
from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import STAGES
from mistral_prune_lora.storage import activations
from mistral_prune_lora.streaming.compute import Compute

IN_A_LAYER = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]
NONE = [math.nan, math.inf, -math.inf]
WINDOWS = random_windows(3, 16)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    save_dense(folder / "dense", dtype=torch.float32)
    cut(folder / "dense", LAYOUT, folder, torch.float32)
    return folder


@pytest.fixture
def parts(sound, tmp_path):
    """A copy to spoil: dense, A, bundles."""
    shutil.copytree(sound, tmp_path / "parts")
    return tmp_path / "parts"


def spoil(file, tensor: str, value: float, place: tuple[int, ...]) -> None:
    """Change one number of a tensor on disk, to what rounding and padding hold too."""
    content = load_file(file)
    content[tensor][place] = value
    save_file(content, file, metadata={"format": "pt"})


def measured(parts, work, dtype=torch.float32, stages=STAGES, **changes):
    subject = Subject.open(parts / "A", {part: parts / "bundles" / part for part in "BC"})
    compute = Compute(torch.device("cpu"), dtype, 2)
    return list(evaluate_stages(subject, stages, WINDOWS, compute, work_dir=work, **changes))


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("tensor", IN_A_LAYER)
def test_one_number_of_a_layer_that_is_none_is_named(parts, tmp_path, tensor, value):
    """Softmax, gates and norms hide none of them, in whatever tensor of a layer, so looking at the states is enough."""
    place = (1, 2) if tensor.endswith("proj.weight") else (1,)
    spoil(parts / "bundles/B/layer_004.safetensors", tensor, value, place)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(NumberError) as caught:
            measured(parts, tmp_path / "work", dtype, ["FULL"])
        assert caught.value.what == f"tensor {tensor} holds NaN or infinity"
        assert caught.value.where == parts / "bundles/B/layer_004.safetensors"


def test_no_boundary_of_states_that_are_none_is_kept(parts, tmp_path):
    spoil(parts / "bundles/B/layer_004.safetensors", "mlp.down_proj.weight", math.nan, (1, 2))
    with pytest.raises(NumberError, match=r"tensor mlp\.down_proj\.weight holds NaN or infinity"):
        measured(parts, tmp_path / "work", stages=["AB", "FULL"])
    (before,) = (tmp_path / "work").glob("*.safetensors")
    assert activations.ActivationReader(before).run["layers"] == [0, 1, 2]


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_one_number_around_the_layers_that_is_none_is_named(parts, tmp_path, tensor, value):
    token = int(WINDOWS.ids[2, 5])
    spoil(parts / "A/model.safetensors", tensor, value, (token, 7) if "norm" not in tensor else (3,))
    with pytest.raises(NumberError, match="holds NaN or infinity") as caught:
        measured(parts, tmp_path / "work")
    row = f", row {token}," if "embed" in tensor else ""
    assert f"tensor {tensor}{row} holds" in str(caught.value)


def test_an_embedding_that_no_window_asks_for_does_not_matter(parts, tmp_path):
    expected = measured(parts, tmp_path / "sound")
    unused = min(set(range(96)) - set(WINDOWS.ids.flatten().tolist()))
    spoil(parts / "A/model.safetensors", "model.embed_tokens.weight", math.nan, (unused, 0))
    found = measured(parts, tmp_path / "work")
    assert [r.record["ppl"] for r in found] == [r.record["ppl"] for r in expected]


def test_weights_and_states_too_large_for_fp16_say_which_dtype_has_room(parts, tmp_path):
    file = parts / "bundles/B/layer_003.safetensors"
    spoil(file, "mlp.up_proj.weight", 1e5, (1, 2))
    assert measured(parts, tmp_path / "fp32")
    with pytest.raises(NumberError, match=r"up_proj.weight holds numbers too large for torch.float16.*bf16 or fp32"):
        measured(parts, tmp_path / "fp16", torch.float16)
    content = load_file(file)
    content["mlp.up_proj.weight"] = torch.full_like(content["mlp.up_proj.weight"], 6e4)
    save_file(content, file, metadata={"format": "pt"})
    with pytest.raises(NumberError) as caught:
        measured(parts, tmp_path / "fp16", torch.float16)
    assert "layers 3-4: the hidden states of window 0 become NaN or infinity" in str(caught.value)
    assert "though all weights are numbers" in str(caught.value) and "bf16 or fp32" in str(caught.value)


def test_a_score_that_is_none_names_stage_and_window(parts, tmp_path):
    """Finite weights, finite hidden states, and logits beyond float32."""
    content = load_file(parts / "A/model.safetensors")
    content["lm_head.weight"] *= 1e38
    content["model.norm.weight"] *= 100
    save_file(content, parts / "A/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumberError, match=r"stage A: the score of window 0 is NaN or infinity: its logits are"):
        measured(parts, tmp_path / "work")


def test_a_perplexity_beyond_the_largest_number_is_no_result(parts, tmp_path):
    content = load_file(parts / "A/model.safetensors")
    content["lm_head.weight"] *= 1e5
    save_file(content, parts / "A/model.safetensors", metadata={"format": "pt"})
    random_windows(3, 16).save(tmp_path / "w.safetensors")
    with pytest.raises(NumberError, match=r"the perplexity, is beyond the largest number \(in A\[A\]\)"):
        score_job(
            stage="A", model_dir=parts / "A", weights_dir=parts / "A", layers=[0, 1, 2, 7], source=None,
            windows=tmp_path / "w.safetensors", result_json=tmp_path / "r.json", window_parquet=tmp_path / "r.parquet",
            dtype="fp32", device="cpu",
        )  # fmt: skip
    assert not (tmp_path / "r.json").exists() and not (tmp_path / "r.parquet").exists()


def test_activations_with_right_checksums_that_are_none_are_named(parts, tmp_path, monkeypatch):
    random_windows(3, 16).save(tmp_path / "w.safetensors")
    given = {"windows": tmp_path / "w.safetensors", "dtype": "fp32", "device": "cpu", "model_dir": parts / "A"}
    spoil(parts / "A/model.safetensors", "model.layers.1.mlp.up_proj.weight", math.nan, (1, 2))
    segment = {"weights_dir": parts / "A", "layers": [0, 1, 2], "source": None, "output": tmp_path / "a.safetensors"}
    with monkeypatch.context() as patch:
        patch.setattr(activations, "first_not_finite", lambda _: None)
        segment_job(**segment, **given)
    goes_on = {"weights_dir": parts / "bundles/B", "layers": [3, 4], "source": tmp_path / "a.safetensors"}
    with pytest.raises(NumberError, match=r"window 0 holds NaN or infinity \(in .*a\.safetensors\)\. Delete it"):
        segment_job(output=tmp_path / "b.safetensors", **goes_on, **given)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_dense_model_s_states_that_are_none_are_named(parts, tmp_path, monkeypatch):
    dense, states = Subject.open(parts / "dense"), tmp_path / "states.safetensors"
    compute = Compute(torch.device("cpu"), torch.float32, 2)
    list(evaluate_stages(dense, ["FULL"], WINDOWS, compute, work_dir=tmp_path / "d", final_hidden=states))
    reader = activations.ActivationReader(states)
    hidden = reader.read(0, 3)
    hidden[1, 4, 5] = math.inf
    monkeypatch.setattr(activations, "first_not_finite", lambda _: None)
    with activations.ActivationWriter(states, reader.shape, reader.dtype, 3, reader.run) as writer:
        writer.write(0, hidden)
        writer.finish()
    with pytest.raises(NumberError, match=r"window 1 holds NaN or infinity \(in .*states\.safetensors\)"):
        measured(parts, tmp_path / "work", dense=DenseAnswers(dense.model, states))


def test_models_of_other_vocabularies_are_not_compared(parts, tmp_path):
    save_dense(tmp_path / "wide", dtype=torch.float32, vocab_size=128)
    wide, states = Subject.open(tmp_path / "wide"), tmp_path / "states.safetensors"
    compute = Compute(torch.device("cpu"), torch.float32, 2)
    list(evaluate_stages(wide, ["FULL"], WINDOWS, compute, work_dir=tmp_path / "d", final_hidden=states))
    with pytest.raises(CheckpointError, match="predicts 96 tokens and the dense model 128"):
        measured(parts, tmp_path / "work", dense=DenseAnswers(wide.model, states))


def test_a_head_of_fewer_tokens_is_refused(parts, tmp_path):
    content = load_file(parts / "A/model.safetensors")
    content["lm_head.weight"] = content["lm_head.weight"][:90].contiguous()
    save_file(content, parts / "A/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight has the shape \(90, 64\), .* \(96, 64\)"):
        measured(parts, tmp_path / "work")


def test_the_command_ends_with_one_line_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_dense(tmp_path / "dense", vocab_size=259)
    save_tokenizer(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} is about {i * i}." for i in range(60)))
    spoil(tmp_path / "dense/model.safetensors", "model.layers.2.mlp.gate_proj.weight", math.inf, (0, 0))
    flags = ["--model_path", "dense", "--text_file", "text.txt", "--seqlen", "32"]
    done = evaluate(tmp_path, *flags, "--json", "r.json", "--csv", "r.csv")
    assert done.code == 1 and "PPL  " not in done.out
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "tensor model.layers.2.mlp.gate_proj.weight holds NaN or infinity" in errors[0]
    assert not (tmp_path / "r.json").exists() and not (tmp_path / "r.csv").exists()


def test_results_hold_numbers_only(parts, tmp_path):
    """Windows that cover no text have no bits per byte, and JSON has no word for NaN."""
    identity = WINDOWS.identity
    bare = type(WINDOWS)(WINDOWS.ids, type(identity)(**{**vars(identity), "utf8_bytes": 0}))
    subject = Subject.open(parts / "A")
    (found,) = evaluate_stages(
        subject, ["A"], bare, Compute(torch.device("cpu"), torch.float32), work_dir=tmp_path / "work"
    )
    assert found.record["bits_per_byte"] is None
    json.dumps(found.record, allow_nan=False)
