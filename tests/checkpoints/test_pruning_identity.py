"""Parts of different prunings are not put together; parts that carry no identity are taken, and that is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cut_model import random_windows, save_dense
from evaluation_jobs import score_job, segment_job
from merge_oracle import edit_json, edit_tensors, random_adapter
from tiny import save_tokenizer
from training_jobs import train_job
from transformers import AutoModelForCausalLM

from mistral_prune_lora.checkpoints.pruning_identity import KEY, check_same_pruning, read_identity
from mistral_prune_lora.distillation.settings import LoraSettings, LossSettings, OptimiserSettings
from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.merging.plan import MergeSettings
from mistral_prune_lora.models.load import load_model, restore_bundle
from mistral_prune_lora.models.stage_manager import DynamicStageManager
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.streaming.compute import Compute

LAYOUT = Layout(5, (1, 2), (3,))
CPU = Compute(torch.device("cpu"), torch.float32)
REFUSED = (
    r"is of the pruning [0-9a-f]{12}, and .*/A\S* is of the pruning [0-9a-f]{12} \(in .*other.*\)\. Use the A model"
)
UNKNOWN, TAKEN = "no pruning_identity", ": taken as parts of one pruning, which nothing shows"


def prune(dense: Path, folder: Path, layout: Layout = LAYOUT) -> dict[str, Path]:
    prune_model(dense, layout, save_dir=folder / "A", save_removed_dir=folder / "bundles")
    return {"A": folder / "A", "B": folder / "bundles/B", "C": folder / "bundles/C"}


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Two dense models of one geometry, each pruned by one layout; adapters that fit both."""
    folder = tmp_path_factory.mktemp("prunings")
    for seed, name in enumerate(("one", "other")):
        dense = save_dense(folder / name / "dense", seed=seed, num_hidden_layers=5)
        save_tokenizer(dense)
        prune(dense, folder / name)
    adapter = random_adapter(
        folder / "adapter", folder / "one/dense", {"r": 2, "target_modules": ["q_proj"]}, layers=[0, 4]
    )
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    random_windows(2, 6).save(folder / "windows.safetensors")
    return folder


@pytest.fixture
def there(originals, tmp_path, capsys) -> Path:
    shutil.copytree(originals, tmp_path / "there")
    capsys.readouterr()
    return tmp_path / "there"


def parts_of(there: Path, name: str = "one") -> dict[str, Path]:
    return {"A": there / name / "A", **{part: there / name / "bundles" / part for part in "BC"}}


def forget(*parts: Path) -> None:
    """Make parts as older versions wrote them."""
    for part in parts:
        for file in part.glob("*.json"):
            content = json.loads(file.read_text())
            if content.pop(KEY, None):
                file.write_text(json.dumps(content))


def unknown_lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if UNKNOWN in line]


def test_every_part_of_a_pruning_carries_its_identity(there):
    parts = parts_of(there)
    told = {read(parts["A"], "manifest.json")[KEY], *(read(parts[p], "bundle_meta.json")[KEY] for p in "BC")}
    told |= {read(parts[part], "prune.json")[KEY] for part in "ABC"}
    assert told == {check_same_pruning(parts.values())}
    assert told != {check_same_pruning(parts_of(there, "other").values())}


def test_it_follows_from_weights_and_layout_and_from_nothing_else(there, tmp_path):
    dense = there / "one/dense"
    identity = read_identity(parts_of(there)["A"])
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    moved = Path(shutil.copytree(dense, tmp_path / "sharded"))
    (moved / "model.safetensors").unlink()
    model.save_pretrained(moved, max_shard_size="60KB")
    assert len(list(moved.glob("model-*.safetensors"))) > 2
    assert read_identity(prune(moved, tmp_path / "moved")["A"]) == identity
    assert read_identity(prune(dense, tmp_path / "layout", Layout(5, (1,), (2, 3)))["A"]) != identity
    for name, change in {
        "weight": lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"][5].neg_(),
        "kept": lambda tensors: tensors["model.norm.weight"][:1].add_(1),
        "dtype": lambda tensors: tensors.update({n: t.float() for n, t in tensors.items()}),
        "more": lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}),
    }.items():
        changed = Path(shutil.copytree(dense, tmp_path / name))
        edit_tensors(changed / "model.safetensors", change)
        assert read_identity(prune(changed, tmp_path / f"{name}-pruned")["A"]) != identity, name


def test_merges_carry_it_on(there, tmp_path, capsys):
    parts = parts_of(there)
    identity = read_identity(parts["A"])
    made = {
        "A": tmp_path / "A_merged",
        "B": tmp_path / "B_merged",
        "only": tmp_path / "only",
        "full": tmp_path / "full",
    }
    merge_adapters(parts["A"], [there / "adapter"], made["A"])
    merge_adapters(parts["B"], [there / "adapter"], made["B"], settings=MergeSettings(skeleton=made["A"]))
    merge_adapters(parts["A"], [there / "adapter"], made["only"], settings=MergeSettings(save_bundle_only=True))
    merge_adapters(
        parts["B"], [there / "adapter"], made["full"], settings=MergeSettings(skeleton=made["A"], save_full_model=True)
    )
    for folder in made.values():
        assert read_identity(folder) == read(folder, "merge.json")[KEY] == identity
    # What is restored for good is of the same pruning still, and goes with its other bundle.
    load_model(made["full"], dtype=torch.float32, bundles=(parts["C"],))
    with pytest.raises(LayoutError, match="is of the pruning"):
        load_model(made["full"], dtype=torch.float32, bundles=(parts_of(there, "other")["C"],))
    assert unknown_lines(capsys) == []


def test_a_bundle_is_not_merged_beside_the_a_of_another_pruning(there, tmp_path):
    bundle = parts_of(there, "other")["B"]
    for options in ({}, {"save_full_model": True}):
        with pytest.raises(LayoutError, match=REFUSED.replace("/A", "/B").replace("other", "one")):
            merge_adapters(
                bundle,
                [there / "adapter"],
                tmp_path / "out",
                settings=MergeSettings(skeleton=parts_of(there)["A"], **options),
            )
    edit_json(there / "adapter/adapter_config.json", base_model_name_or_path=str(parts_of(there)["A"]))
    with pytest.raises(LayoutError, match="is of the pruning"):
        merge_adapters(bundle, [there / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # An adapter's base that is dense, or gone, is no part.
    for named in (there / "one/dense", "/nowhere/A"):
        edit_json(there / "adapter/adapter_config.json", base_model_name_or_path=str(named))
        merge_adapters(bundle, [there / "adapter"], tmp_path / "out")


def test_a_bundle_of_another_pruning_is_not_restored(there):
    ours, theirs = parts_of(there), parts_of(there, "other")
    with pytest.raises(LayoutError, match=REFUSED):
        load_model(ours["A"], dtype=torch.float32, bundles=(ours["B"], theirs["C"]))
    model = load_model(ours["A"], dtype=torch.float32)
    with pytest.raises(LayoutError, match=REFUSED):
        restore_bundle(model, theirs["B"])
    with pytest.raises(LayoutError, match=REFUSED):
        DynamicStageManager(ours["A"], {"B": ours["B"], "C": theirs["C"]}, dtype=torch.float32)


def test_bundles_of_two_prunings_are_not_restored_into_one_that_does_not_say_what_it_is_of(there):
    ours, theirs = parts_of(there), parts_of(there, "other")
    forget(ours["A"])
    model = load_model(ours["A"], dtype=torch.float32)
    restore_bundle(model, ours["B"])
    with pytest.raises(LayoutError, match="is of the pruning"):
        restore_bundle(model, theirs["C"])


def train(folder: Path, output: Path, stage: str, a: Path, *bundles: Path) -> None:
    train_job(
        stage,
        student_dir=a,
        bundles=bundles,
        teacher_dir=None,
        windows=random_windows(2, 6),
        output_dir=output,
        lora=LoraSettings(rank=2, target_modules=("q_proj",)),
        loss=LossSettings(kd_alpha=0),
        optimiser=OptimiserSettings(steps=1, batch_size=1, gradient_accumulation=1, warmup_steps=0),
        dtype=torch.float32,
    )


def test_an_adapter_is_not_trained_on_parts_of_two_prunings(there, tmp_path, capsys):
    ours, theirs = parts_of(there), parts_of(there, "other")
    with pytest.raises(LayoutError, match=REFUSED):
        train(there, tmp_path / "lora", "C", ours["A"], ours["B"], theirs["C"])
    assert not (tmp_path / "lora").exists()
    train(there, tmp_path / "lora", "B", ours["A"], ours["B"])
    identity = read_identity(ours["A"])
    assert read(tmp_path / "lora", "training.json")["pruning_identities"] == {
        str(ours["A"]): identity,
        str(ours["B"]): identity,
    }
    assert unknown_lines(capsys) == []


def test_parts_of_two_prunings_are_not_evaluated(there, tmp_path):
    ours, theirs = parts_of(there), parts_of(there, "other")
    with pytest.raises(LayoutError, match=REFUSED):
        Subject.open(ours["A"], {"B": ours["B"], "C": theirs["C"]})
    subject = Subject.open(ours["A"], {"B": ours["B"]})
    (result,) = evaluate_stages(subject, ["AB"], random_windows(2, 6), CPU, work_dir=tmp_path / "work")
    assert result.record[KEY] == read_identity(ours["A"])


def test_jobs_of_the_workflow_refuse_them_too(there, tmp_path, capsys):
    ours, theirs = parts_of(there), parts_of(there, "other")
    common = {"model_dir": ours["A"], "windows": there / "windows.safetensors", "dtype": "fp32", "device": "cpu"}
    segment_job(**common, weights_dir=ours["A"], layers=[0], source=None, output=tmp_path / "first.safetensors")
    source = tmp_path / "first.safetensors"
    with pytest.raises(LayoutError, match=REFUSED):
        segment_job(**common, weights_dir=theirs["B"], layers=[1, 2], source=source, output=tmp_path / "B.safetensors")
    assert not (tmp_path / "B.safetensors").exists()
    ends = {"result_json": tmp_path / "r.json", "window_parquet": tmp_path / "r.parquet"}
    with pytest.raises(LayoutError, match=REFUSED):
        score_job(**common, **ends, stage="AB", weights_dir=theirs["B"], layers=[1, 2], source=source)
    assert not (tmp_path / "r.json").exists()
    score_job(**common, **ends, stage="AB", weights_dir=ours["B"], layers=[1, 2], source=source)
    assert read(tmp_path, "r.json")[KEY] == read_identity(ours["A"])
    assert unknown_lines(capsys) == []


def test_parts_without_an_identity_are_taken_with_one_line(there, tmp_path, capsys):
    parts = parts_of(there)
    forget(parts["A"])
    # An old A among new bundles, as a pruning leaves them that is killed in a version that did not tie them together.
    load_model(parts["A"], dtype=torch.float32, bundles=(parts["B"], parts["C"]))
    identity = read_identity(parts["B"])
    assert unknown_lines(capsys) == [
        f"{parts['A']} has no pruning_identity, and {parts['B']} is of the pruning {identity[:12]}{TAKEN}"
    ]
    forget(parts["B"], parts["C"])
    subject = Subject.open(parts["A"], {"B": parts["B"], "C": parts["C"]})
    results = list(evaluate_stages(subject, ["A", "AB", "FULL"], random_windows(2, 6), CPU, work_dir=tmp_path / "work"))
    assert [result.record[KEY] for result in results] == [None] * 3
    assert unknown_lines(capsys) == [f"{parts['A']}, {parts['B']}, {parts['C']} have no pruning_identity{TAKEN}"]
    for part in "BC":
        merge_adapters(parts[part], [there / "adapter"], tmp_path / part, settings=MergeSettings(skeleton=parts["A"]))
    assert len(unknown_lines(capsys)) == 2
    assert KEY not in read(tmp_path / "B", "bundle_meta.json") and read(tmp_path / "B", "merge.json")[KEY] is None


def test_training_and_switching_stages_say_it_once(there, tmp_path, capsys):
    parts = parts_of(there)
    forget(parts["B"])
    train(there, tmp_path / "lora", "B", parts["A"], parts["B"])
    assert len(unknown_lines(capsys)) == 1
    assert read(tmp_path / "lora", "training.json")["pruning_identities"][str(parts["B"])] is None
    forget(parts["C"])
    manager = DynamicStageManager(parts["A"], {part: parts[part] for part in "BC"}, dtype=torch.float32)
    for stage in ("AB", "FULL", "A", "FULL"):
        manager.set_stage(stage)
    assert len(unknown_lines(capsys)) == 1


def test_a_restored_model_claims_no_pruning_that_its_bundle_does_not(there, tmp_path, capsys):
    parts = parts_of(there)
    forget(parts["B"])
    options = {"skeleton": parts["A"], "save_full_model": True}
    merge_adapters(parts["B"], [there / "adapter"], tmp_path / "full", settings=MergeSettings(**options))
    assert len(unknown_lines(capsys)) == 1
    assert read_identity(tmp_path / "full") is None


def test_a_part_alone_and_a_dense_model_need_none(there, tmp_path, capsys):
    parts = parts_of(there)
    forget(*parts.values())
    load_model(parts["A"], dtype=torch.float32)
    load_model(there / "one/dense", dtype=torch.float32)
    merge_adapters(parts["A"], [there / "adapter"], tmp_path / "A_merged")
    assert check_same_pruning([there / "one/dense", parts["B"], None, "some/model"]) is None
    assert check_same_pruning([]) is None
    assert unknown_lines(capsys) == []


@pytest.mark.parametrize("value", ["", "abc", 7, ["a"], "A" * 64, "a" * 65])
def test_what_is_no_identity_is_refused(there, value):
    bundle = parts_of(there)["B"]
    edit_json(bundle / "bundle_meta.json", **{KEY: value})
    with pytest.raises(LayoutError, match=r"pruning_identity is .* not a sha256 \(in .*bundle_meta.json"):
        check_same_pruning([bundle])


def test_a_new_pruning_in_the_place_of_a_killed_one_is_whole(there):
    """Bundles of a pruning beside the A of another, which one file each shows."""
    ours, theirs = parts_of(there), parts_of(there, "other")
    for part in "BC":
        shutil.rmtree(ours[part])
        shutil.copytree(theirs[part], ours[part])
    with pytest.raises(LayoutError, match="is of the pruning"):
        check_same_pruning(ours.values())
    prune_model(there / "other/dense", LAYOUT, save_dir=ours["A"], save_removed_dir=ours["B"].parent)
    assert check_same_pruning(ours.values()) == check_same_pruning(theirs.values())
