"""A flipped bit in weights that a record tells of is found by everything that reads them; nothing else is refused."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from cut_model import random_windows, save_dense
from evaluation_jobs import score_job, segment_job
from merge_oracle import edit_json, random_adapter
from tiny import save_tokenizer
from training_jobs import train_job

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.written import read_written, weights_entry
from mistral_prune_lora.distillation.settings import LoraSettings, OptimiserSettings
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.exporting.export import export_stage
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.merging.plan import MergeSettings
from mistral_prune_lora.models.stage_manager import DynamicStageManager
from mistral_prune_lora.provenance import PACKAGE, VERSION, other_files_sha256
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.pruning.importance import last_token_states
from mistral_prune_lora.storage.digests import weight_file_digests
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.safetensors_file import read_header
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.windows import Windows

LAYOUT = Layout(5, (1, 2), (3,))
CPU = Compute(torch.device("cpu"), torch.float32)
JOB = {"dtype": "fp32", "batch_size": 2}
A, B = "merged/A/model.safetensors", "merged/B/layer_001.safetensors"
DENSE, BUNDLE = "dense/model.safetensors", "bundles/B/layer_002.safetensors"
LAYER, SHORT = "model.layers.0.mlp.up_proj.weight", "mlp.up_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A dense model with the record of a fetch, its parts, A and B merged, A exported."""
    folder = tmp_path_factory.mktemp("written")
    dense = save_dense(folder / "dense", num_hidden_layers=5)
    save_tokenizer(dense)
    record = {"hub": {}, "files": other_files_sha256(dense, ()), "versions": {PACKAGE: VERSION}}
    digests = {"model.safetensors": weight_file_digests(dense / "model.safetensors")}
    write_json(dense / "source.json", record | {"weights": weights_entry(digests)})
    prune_model(dense, LAYOUT, save_dir=folder / "A", save_removed_dir=folder / "bundles")
    for part, base, layers in (("A", folder / "A", [0, 4]), ("B", folder / "bundles/B", [1, 2])):
        settings = {"r": 2, "target_modules": ["q_proj"]}
        adapter = random_adapter(folder / f"adapters/{part}", dense, settings, layers=layers)
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
        merge_adapters(base, [adapter], folder / f"merged/{part}", settings=MergeSettings(skeleton=folder / "A"))
    export_stage(folder / "merged/A", folder / "exported", stage="A")
    random_windows(3, 12).save(folder / "windows.safetensors")
    return folder


@pytest.fixture
def there(originals, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(originals, tmp_path / "there")


def flip(file: Path, tensor: str) -> None:
    """Flip the lowest bit of one number: finite before and after."""
    place = read_header(file)[tensor].start + 100
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def record_of(file: Path) -> Path:
    names = ("merge.json", "prune.json", "source.json", "export.json")
    return next(file.parent / name for name in names if (file.parent / name).is_file())


def as_older_versions_wrote_it(record: Path) -> None:
    content = json.loads(record.read_text())
    del content["weights"]
    record.write_text(json.dumps(content))


def train(there, out, part, student, bundles=()):
    settings = {"lora": LoraSettings(rank=2), "optimiser": OptimiserSettings(steps=1, warmup_steps=0, batch_size=1)}
    windows = Windows.load(there / "windows.safetensors")
    train_job(
        part, student_dir=student, teacher_dir=there / "dense", bundles=bundles, windows=windows, output_dir=out,
        dtype=torch.float32, **settings,
    )  # fmt: skip


def merge(there, out, base, part):
    merge_adapters(base, [there / f"adapters/{part}"], out, settings=MergeSettings(skeleton=there / "A"))


def segment(there, out, weights, layers, source=None):
    given = {"model_dir": there / "merged/A", "windows": there / "windows.safetensors", "source": source}
    segment_job(out, weights_dir=weights, layers=layers, **given, **JOB)


def score(there, out):
    out.mkdir()
    score_job(
        "A", result_json=out / "a.json", window_parquet=out / "a.parquet", model_dir=there / "merged/A",
        weights_dir=None, layers=(0, 4), windows=there / "windows.safetensors", **JOB,
    )  # fmt: skip


def evaluate(there, out):
    subject = Subject.open(there / "merged/A", {"B": there / "merged/B"})
    windows = Windows.load(there / "windows.safetensors")
    list(evaluate_stages(subject, ["A", "AB"], windows, CPU, work_dir=out))


def generate(there, out):
    manager = DynamicStageManager(there / "merged/A", {"B": there / "merged/B"}, dtype=torch.float32)
    manager.set_stage("AB")


def calibrate(there, out):
    last_token_states(there / "dense", random_windows(2, 8).ids, beside=out, compute=CPU)


READERS = {
    "a segment of A": (A, LAYER, lambda there, out: segment(there, out, None, [0])),
    "a segment of B": (B, SHORT, lambda there, out: segment(there, out, there / "merged/B", [1])),
    "the embedding": (A, "model.embed_tokens.weight", lambda there, out: segment(there, out, None, [0])),
    "a stage's layers": (A, LAYER, score),
    "a stage's head": (A, "lm_head.weight", score),
    "an evaluation, A": (A, LAYER, evaluate),
    "an evaluation, B": (B, SHORT, evaluate),
    "generation, A": (A, LAYER, generate),
    "generation, B": (B, SHORT, generate),
    "the student A": ("A/model.safetensors", LAYER, lambda there, out: train(there, out, "A", there / "A")),
    "the student's bundle": (
        BUNDLE,
        SHORT,
        lambda there, out: train(there, out, "B", there / "merged/A", (there / "bundles/B",)),
    ),
    "the teacher": (DENSE, LAYER, lambda there, out: train(there, out, "A", there / "A")),
    "the teacher's states": (
        DENSE,
        LAYER,
        lambda there, out: teacher_states(
            there / "dense", Windows.load(there / "windows.safetensors"), out, compute=CPU
        ),
    ),
    "a merge into A": ("A/model.safetensors", LAYER, lambda there, out: merge(there, out, there / "A", "A")),
    "a merge into B": (BUNDLE, SHORT, lambda there, out: merge(there, out, there / "bundles/B", "B")),
    "an export": (A, LAYER, lambda there, out: export_stage(there / "merged/A", out, stage="A")),
    "pruning": (
        DENSE,
        LAYER,
        lambda there, out: prune_model(there / "dense", LAYOUT, save_dir=out / "A", save_removed_dir=out / "bundles"),
    ),
    "the ranking of blocks": (DENSE, LAYER, calibrate),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_finds_a_flipped_bit_and_takes_what_is_as_it_was_written(reader, there, tmp_path):
    name, tensor, read = READERS[reader]
    file, outputs = there / name, (tmp_path / f"out{number}" for number in itertools.count())
    record = record_of(file)
    message = rf"is not what {record.name} says was written \(in .*{file.name}\)\. (Merge|Prune|Fetch) it again"
    read(there, next(outputs))
    intact = file.read_bytes()
    flip(file, tensor)
    with pytest.raises(CheckpointError, match=message):
        read(there, refused := next(outputs))
    assert not any(path.is_file() for path in (refused, *refused.rglob("*")))
    as_older_versions_wrote_it(record)
    with pytest.raises(CheckpointError, match="the file " + message):
        read(there, next(outputs))
    file.write_bytes(intact)
    read(there, next(outputs))
    flip(file, tensor)
    record.unlink()
    read(there, next(outputs))


def test_an_export_is_read_by_its_record(there):
    file = there / "exported/model.safetensors"
    open_checkpoint(there / "exported").check_files()
    flip(file, "model.layers.1.mlp.up_proj.weight")
    exported = open_checkpoint(there / "exported")
    for check in (exported.check_files, lambda: exported.check_tensors(exported.entries.values())):
        with pytest.raises(CheckpointError, match=r"is not what export\.json says was written .*\. Export it again"):
            check()


@pytest.mark.parametrize("name", [A, B, BUNDLE, DENSE])
def test_another_header_is_found_when_the_file_is_opened(there, name):
    file = there / name
    open_checkpoint(file.parent)
    data = file.read_bytes()
    changed = data.replace(b'"format":"pt"', b'"format":"pu"')
    assert changed != data
    file.write_bytes(changed)
    with pytest.raises(CheckpointError, match="its header is not what"):
        open_checkpoint(file.parent)


def test_only_tensors_that_are_read_are_held_against_the_record(there, tmp_path):
    flip(there / A, "lm_head.weight")
    segment(there, tmp_path / "out", None, [0])
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is not what merge\.json says"):
        score(there, tmp_path / "scores")


def test_a_record_tells_of_nothing_that_it_does_not_name(there):
    bundle = there / "merged/B"
    shutil.copy(bundle / "layer_001.safetensors", bundle / "layer_004.safetensors")
    edit_json(bundle / "bundle_meta.json", indices=[1, 2, 4], layer_indices=[1, 2, 4])
    opened = open_checkpoint(bundle)
    flip(bundle / "layer_004.safetensors", SHORT)
    opened.check_files()
    opened.check_tensors(opened.layer(4).values())


@pytest.mark.parametrize(
    "content",
    [{}, {"files": ["a"], "versions": {PACKAGE: "0"}}, {"files": {"model.safetensors": "0"}}, {"versions": [PACKAGE]}],
)
def test_what_is_no_record_of_ours_is_passed_over(tmp_path, content):
    save_dense(tmp_path / "dense", num_hidden_layers=2)
    write_json(tmp_path / "dense/source.json", content)
    assert read_written(tmp_path / "dense") is None
    open_checkpoint(tmp_path / "dense").check_files()


def test_a_record_without_digests_tells_nothing(there):
    """As pruning wrote it once."""
    content = json.loads((there / "A/prune.json").read_text())
    del content["outputs"], content["weights"]
    (there / "A/prune.json").write_text(json.dumps(content))
    assert open_checkpoint(there / "A").written is None


def test_a_record_that_cannot_be_read_is_an_error(there):
    (there / "merged/A/merge.json").write_text('{"outputs": ')
    with pytest.raises(CheckpointError, match=r"cannot be read as JSON.*merge\.json"):
        open_checkpoint(there / "merged/A")


def test_records_name_every_file_and_every_tensor(there):
    for folder, record in (("A", "prune"), ("bundles/B", "prune"), ("merged/A", "merge"), ("exported", "export")):
        content = json.loads((there / folder / f"{record}.json").read_text())
        assert content["outputs"] == other_files_sha256(there / folder, (f"{record}.json",))
        weights = {file.name: weight_file_digests(file) for file in (there / folder).glob("*.safetensors")}
        assert content["weights"] == weights_entry(weights) and weights
        assert all(own.sha256 == content["outputs"][name] for name, own in weights.items())
