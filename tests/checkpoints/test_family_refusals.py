"""What is not taken is refused by every command before any work, in words that name what is."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from cut_model import cut, random_windows, save_dense
from evaluation_jobs import segment_job
from tiny import save_adapter, save_tokenizer, tiny_config
from transformers import AutoConfig, Gemma2Config, LlavaConfig, MixtralConfig, Phi3Config

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint
from mistral_prune_lora.checkpoints.families import FAMILIES, check_family, read_config
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.mistral_eval_ppl_mergedmodel import main as evaluate
from mistral_prune_lora.mistral_optimized_kd_lora import main as train
from mistral_prune_lora.models.config import model_config
from mistral_prune_lora.models.load import load_model
from mistral_prune_lora.models.stage_manager import DynamicStageManager
from mistral_prune_lora.pruning.importance import last_token_states
from mistral_prune_lora.pruning.layeronly_drop import main as prune
from mistral_prune_lora.pruning.mistral_merge_adapter import main as merge
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.workflow.checks import check_inputs
from mistral_prune_lora.workflow.configuration import ConfigError, check_config

LAYOUT = Layout(8, (3, 4), (5, 6))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = ["full_attention"] * 4 + ["sliding_attention"] * 4


@pytest.mark.parametrize("config_class", [Gemma2Config, LlavaConfig, MixtralConfig, Phi3Config])
def test_other_families_are_refused_and_the_supported_ones_named(config_class):
    config = config_class().to_dict()
    with pytest.raises(CheckpointError) as caught:
        check_family(config, "somewhere/config.json")
    told = str(caught.value)
    assert f"the model_type {config['model_type']!r} is not one that is supported (in somewhere/config.json)" in told
    assert "mistral, llama, qwen2, qwen3" in told


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_for_the_families_is_taken(family):
    check_family(tiny_config(family).to_dict(), "config.json")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 4096, "architectures": ["MistralForCausalLM"]}),
        ("mistral", {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 8}),
        ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}, "rope_theta": 500000.0}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"layer_types": ["full_attention"] * 8, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4096, "layer_types": KINDS}),
    ],
)
def test_settings_that_the_families_know_are_taken(family, changes):
    check_family(tiny_config(family).to_dict() | changes, "config.json")


@pytest.mark.parametrize(
    "published",
    [
        {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "bfloat16"},
        {
            "model_type": "llama", "rope_theta": 500000.0, "pretraining_tp": 1, "max_position_embeddings": 131072,
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}, "torch_dtype": "bfloat16",
        },
        {
            "model_type": "qwen2", "rope_theta": 1000000.0, "max_window_layers": 28, "sliding_window": 131072,
            "use_sliding_window": False, "use_mrope": False, "torch_dtype": "bfloat16",
        },
        {"model_type": "qwen3", "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "head_dim": 128},
    ],
)  # fmt: skip
def test_the_keys_that_published_configurations_have_are_read_as_transformers_reads_them(tmp_path, published):
    """Older than the present ones: rope_theta and rope_scaling for rope_parameters, torch_dtype for dtype."""
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 4, **published}))
    config = model_config(Checkpoint(tmp_path, "model", {}, read_config(tmp_path)))
    expected = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert config.to_dict() == expected | {"_name_or_path": ""}


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("llama", {"vision_config": {"hidden_size": 8}}, "there is a vision_config"),
        ("mistral", {"text_config": {"model_type": "mistral"}}, "there is a text_config"),
        ("qwen2", {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, "there is an auto_map"),
        ("mistral", {"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "this is no causal language model"),
        ("mistral", {"architectures": "MistralModel"}, "the architectures are 'MistralModel'"),
        ("llama", {"is_causal": False}, "is_causal is false"),
        ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2]}}, "of type 'mrope'"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "of type 'proportional'"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "'llama3' has no low_freq_factor"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'linear' has no factor"),
        ("llama", {"rope_scaling": "linear"}, "the rotary embedding is 'linear', not an object"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "another kind for each kind of"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "factor is 0.5"),
        ("llama", {"sliding_window": 8, "layer_types": KINDS}, "asks for more than full_attention"),
        ("mistral", {"sliding_window": 8, "layer_types": KINDS}, "asks for more than sliding_attention"),
        ("mistral", {"layer_types": ["sliding_attention"] * 8}, "asks for more than full_attention"),
        ("qwen2", {"layer_types": KINDS}, "no sliding window is switched on"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 8}, "layer_types are not all of full_attention"),
        ("qwen3", {"layer_types": ["full_attention"] * 7}, "7 layer_types and num_hidden_layers is 8"),
    ],
)
def test_what_a_family_s_own_code_would_pass_over_or_not_run_is_refused(family, changes, told):
    with pytest.raises(CheckpointError) as caught:
        check_family(tiny_config(family).to_dict() | changes, "config.json")
    assert told in str(caught.value) and "mistral, llama, qwen2, qwen3" in str(caught.value)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A dense model, its parts and an adapter, all of them made into a Gemma's by one word."""
    dense = save_dense(tmp_path / "dense", vocab_size=259)
    save_tokenizer(dense)
    cut(dense, LAYOUT, tmp_path)
    save_adapter(tmp_path / "B_lora", dense, [3, 4], 0)
    for name in ("dense", "A"):
        disguise(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def disguise(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "gemma2"}))


OUTPUTS = ["--save_dir", "out/A", "--save_removed_dir", "out/bundles"]
NO_TEXT = ["--text_file", "no_such_text.txt"]
COMMANDS = {
    "prune": (prune, ["--model", "dense", *NO_TEXT, *OUTPUTS]),
    "prune layers": (prune, ["--model", "dense", "--b_layers", "3", "--c_layers", "4", *OUTPUTS]),
    "train": (train, ["--stage", "A", "--teacher", "dense", "--student", "A", "--output_dir", "out", *NO_TEXT]),
    "merge A": (merge, ["--base_model", "A", "--adapter_path", "B_lora", "--output_dir", "out"]),
    "merge B": (
        merge,
        ["--base_model", "bundles/B", "--skeleton", "A", "--adapter_path", "B_lora", "--output_dir", "out"],
    ),
    "merge B, its base": (merge, ["--base_model", "bundles/B", "--adapter_path", "B_lora", "--output_dir", "out"]),
    "evaluate": (evaluate, ["--model_path", "A", *NO_TEXT, "--json", "out.json"]),
    "evaluate stages": (evaluate, ["--model_path", "A", "--bundles_dir", "bundles", *NO_TEXT]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_before_any_work(project, capsys, command):
    before = sorted(project.rglob("*"))
    main, arguments = COMMANDS[command]
    assert main(arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the model_type 'gemma2' is not one that is supported" in line and "mistral, llama, qwen2, qwen3" in line
    assert sorted(project.rglob("*")) == before


def test_a_student_is_refused_before_the_text_is_read(project, capsys):
    model = save_dense(project / "teacher", vocab_size=259)
    save_tokenizer(model)
    assert train(["--stage", "A", "--teacher", "teacher", "--student", "A", "--output_dir", "out", *NO_TEXT]) == 1
    assert "gemma2" in capsys.readouterr().err


def test_the_library_refuses_where_it_opens_a_model(project):
    windows = random_windows(2, 8)
    windows.save(project / "windows.safetensors")
    calls = [
        lambda: load_model("A", dtype=torch.float32),
        lambda: DynamicStageManager("A", {}, dtype=torch.float32),
        lambda: last_token_states("dense", windows.ids, beside="states.csv", compute=Compute.named("cpu", "fp32")),
        lambda: teacher_states("dense", windows, "states.safetensors", compute=Compute.named("cpu", "fp32")),
        lambda: segment_job(
            model_dir="A",
            weights_dir="A",
            layers=[0],
            windows="windows.safetensors",
            source=None,
            output="hidden.safetensors",
            dtype="fp32",
        ),
    ]
    for call in calls:
        with pytest.raises(CheckpointError, match="'gemma2' is not one that is supported"):
            call()
    assert not list(project.glob("*states*")) and not list(project.glob("*hidden*"))


def test_the_configuration_check_refuses_local_models(project):
    schema = Path(__file__).parents[2] / "rules/config.schema.yaml"
    experiment = {"model": "mine", "perplexity": {"datasets": ["text"]}, "adapters": {p: p for p in "ABC"}}
    config = {
        "models": {"mine": {"path": "dense", "num_layers": 8}},
        "datasets": {"text": {"text_files": ["text.txt"]}},
        "experiments": {"cut": {**experiment, "layers": {"B": [3], "C": []}}},
    }
    told = check_inputs(check_config(copy.deepcopy(config), schema)).faults
    assert told[0].startswith("models.mine.path: the model_type 'gemma2' is not one that is supported (in ")
    config["experiments"]["pruned"] = {**experiment, "pruned": {"A": "A", "bundles": "bundles"}}
    with pytest.raises(ConfigError, match=r"experiments\.pruned\.pruned: the model_type 'gemma2'"):
        check_config(config, schema)


def test_neither_the_families_nor_the_configuration_import_torch():
    code = "import sys, mistral_prune_lora.workflow.configuration, mistral_prune_lora.workflow.checks\n"
    code += "from mistral_prune_lora.checkpoints import families; assert families.FAMILIES\n"
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_of_a_hub_model_the_configuration_is_fetched_first(project, monkeypatch, capsys):
    asked = []

    def snapshot_download(repo_id, *, allow_patterns, **options):
        asked.append(allow_patterns)
        return str(project / "dense")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert prune(["--model", "somebody/gemma", *OUTPUTS]) == 1
    assert "gemma2" in capsys.readouterr().err and asked == [["config.json"]]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1]", "is not a JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"model_type": "llama", "num_hidden_layers": "8"}', "num_hidden_layers is '8'"),
        ('{"model_type": "llama"}', "num_hidden_layers is None"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, told):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=told):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"hidden_act": 5}, "is no configuration that transformers takes"), ({"hidden_size": "64"}, "hidden_size")],
)
def test_a_configuration_that_transformers_refuses_is_one_line(tmp_path, changes, told):
    dense = save_dense(tmp_path / "dense")
    file = dense / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=told):
        load_model(dense, dtype=torch.float32)
