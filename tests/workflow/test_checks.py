"""What a configuration names, looked at before the first job: every mistake at once, nothing sound refused."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from cut_model import cut
from safetensors.torch import load_file, save_file
from tiny import save_adapter, tiny_config
from transformers import MistralForCausalLM

from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.workflow.checks import check_inputs
from mistral_prune_lora.workflow.configuration import ConfigError, check_config

SCHEMA = Path(__file__).parents[2] / "rules" / "config.schema.yaml"
LAYOUT = Layout(8, (3, 4), (5, 6))
HUB = {"hub": {"repo_id": "a/b", "revision": "0" * 40}, "num_layers": 8}


@pytest.fixture
def here(project, monkeypatch):
    """The project, in whose folder everything is looked up; its experiment takes all adapters as given."""
    monkeypatch.chdir(project.folder)
    project.experiment = project.config["experiments"]["tiny"]
    return project


def checked(project):
    return check_inputs(check_config(project.config, SCHEMA))


def fault(project):
    """The one mistake that is found."""
    found = checked(project).faults
    assert len(found) == 1, found
    return found[0]


def change_json(path, **changes):
    path = Path(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def give_pruned(project):
    """Make the experiment one with a given pruned model; its directories of A and the bundles."""
    a, bundles = cut(Path("dense"), LAYOUT, Path("old"))
    del project.experiment["layers"]
    project.experiment["pruned"] = {"A": str(a), "bundles": str(bundles["B"].parent)}
    return a, bundles


def test_a_sound_project_has_no_faults_and_no_warnings(here):
    found = checked(here)
    assert found.faults == [] and found.warnings == []


def test_no_torch_and_no_transformers_are_needed(here):
    here.snakemake_free = json.dumps(check_config(here.config, SCHEMA))
    code = (
        "import json, sys; from mistral_prune_lora.workflow.checks import check_inputs;"
        f"found = check_inputs(json.loads({here.snakemake_free!r})); assert not found.faults, found;"
        "from mistral_prune_lora.workflow.preview import preview;"
        f"preview(json.loads({here.snakemake_free!r}));"
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_missing_paths_are_told_at_once_with_what_is_there(here):
    here.config["models"]["dense"]["path"] = "models/dense"
    here.config["datasets"]["corpus"]["text_files"] = ["corpus.txt", "adapters/none.txt"]
    here.config["datasets"]["own"] = {"dataset": "data/x.parquet"}
    here.config["datasets"]["wiki"] = {"dataset": "wikitext2", "mirror": "mirror"}
    here.experiment["perplexity"]["datasets"] = ["corpus", "own", "wiki"]
    here.experiment["adapters"] |= {"A": "trian", "B": "adapters/gone/B"}
    faults = checked(here).faults
    told = {line.split(": ")[0]: line for line in faults}
    assert set(told) == {
        "models.dense.path", "datasets.corpus.text_files.1", "datasets.own.dataset", "datasets.wiki.mirror",
        "experiments.tiny.adapters.A", "experiments.tiny.adapters.B",
    }  # fmt: skip
    assert f"there is no adapters/gone/B; of this path, {here.folder / 'adapters'} is there" in "".join(faults)
    assert "or the word train" in told["experiments.tiny.adapters.A"]


@pytest.mark.parametrize(
    "path", ["x" * 5000, "a\0b", "", "corpus.txt/below", "\udcff"], ids=lambda path: f"{len(path)}"
)
def test_paths_that_no_file_system_takes_are_missing_ones(here, path):
    here.config["models"]["dense"]["path"] = here.experiment["adapters"]["A"] = path
    here.config["datasets"]["corpus"]["text_files"] = [path]
    faults = checked(here).faults
    assert len(faults) == 3 and all(f"of this path, {here.folder} is there" in line for line in faults)


def test_a_fault_that_experiments_share_is_told_once(here):
    here.experiment["adapters"]["C"] = "nowhere"
    here.config["experiments"] |= {f"x{i}": here.experiment for i in range(3)}
    assert fault(here).startswith("experiments.tiny.adapters.C (and 3 more): there is no nowhere")


@pytest.mark.parametrize("used", [True, False])
def test_what_no_experiment_uses_is_only_doubted(here, used):
    here.config["models"]["other"] = {"path": "gone", "num_layers": 8}
    here.config["datasets"]["other"] = {"dataset": "gone.txt"}
    if used:
        here.config["experiments"]["second"] = {
            **here.experiment, "model": "other", "perplexity": {**here.experiment["perplexity"], "datasets": ["other"]},
        }  # fmt: skip
    found = checked(here)
    lines = found.faults if used else found.warnings
    assert [line.split(":")[0] for line in lines] == ["models.other.path", "datasets.other.dataset"]
    assert found.faults if used else not found.faults


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda d: (d / "config.json").unlink(), "dense holds no config.json"),
        (lambda d: change_json(d / "config.json", model_type="gpt2"), "the model_type 'gpt2' is not one"),
        (lambda d: (d / "model.safetensors").unlink(), "there is no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"short"), "not a safetensors file, or cut short"),
        (drop_tensor, "has no tensor model.norm.weight"),
        (lambda d: change_json(d / "config.json", intermediate_size=120), "and by config.json it is (120, 64)"),
        (lambda d: (d / "tokenizer.json").unlink(), "there is no tokenizer"),
        (lambda d: change_json(d / "tokenizer_config.json", auto_map={"a": "b"}), "brings code of its own"),
    ],
)
def test_a_local_model_that_is_not_whole(here, spoil, told):
    spoil(here.folder / "dense")
    assert fault(here).startswith("models.dense.path: ") and told in fault(here)


def test_a_tokenizer_may_lie_in_the_original_config(here):
    Path("dense/original_config").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("dense", name).rename(f"dense/original_config/{name}")
    assert checked(here).faults == []


def test_a_wrong_number_of_layers(here):
    here.config["models"]["dense"]["num_layers"] = 9
    assert "models.dense.num_layers: 9, and dense/config.json counts 8 layers" in checked(here).faults


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "there is no adapter_config.json"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "there is no adapter_model.safetensors"),
        (lambda d: change_json(d / "adapter_config.json", peft_type="IA3"), "is of type IA3"),
        (lambda d: change_json(d / "adapter_config.json", r=5), "has rank 4, but the configuration says 5"),
        (lambda d: change_json(d / "adapter_config.json", target_modules=["q_proj"]), "does not target"),
        (lambda d: change_json(d / "adapter_config.json", target_modules=["q_proj", "down_proj", "k_proj"]),
         "targets model.layers.3.self_attn.k_proj, but holds no tensors for it"),
    ],
)  # fmt: skip
def test_an_adapter_that_would_not_be_merged(here, spoil, told):
    spoil(Path("adapters/B"))
    assert fault(here).startswith("experiments.tiny.adapters.B: ") and told in fault(here)


def test_an_adapter_below_the_directory_that_is_given_is_pointed_at(here):
    Path("trained").mkdir()
    shutil.move("adapters/C", "trained/stageC")
    here.experiment["adapters"]["C"] = "trained"
    assert "of the directories in it, trained/stageC does" in fault(here)


def test_adapters_of_other_layers_than_their_part_s(here):
    here.experiment["adapters"] |= {"A": "adapters/B", "B": "adapters/C"}
    a, b = checked(here).faults
    assert a.startswith("experiments.tiny.adapters.A: changes model.layers.3.")
    assert b.startswith("experiments.tiny.adapters.B: matches nothing: it has no tensors for layers 3-4")


def test_one_adapter_for_two_parts_whose_layers_it_holds(here):
    save_adapter(Path("both"), Path("dense"), [3, 4, 5, 6], 0)
    here.experiment["adapters"] |= {"B": "both", "C": "both"}
    assert checked(here).faults == []


def test_compact_adapters_are_taken_with_the_setting_and_refused_without(here):
    save_adapter(Path("compact"), Path("dense"), [0, 1, 2, 3], 0)
    here.experiment["adapters"]["A"] = "compact"
    assert "it counts the kept layers from 0" in fault(here)
    here.experiment["adapter_indices"] = "compact"
    assert checked(here).faults == []
    here.experiment["adapters"]["A"] = "adapters/A"
    assert "it does not count them from 0" in fault(here)


def test_shapes_are_held_against_a_local_model_and_not_against_one_to_be_fetched(here):
    torch.manual_seed(0)
    MistralForCausalLM(tiny_config(intermediate_size=96)).save_pretrained("wide")
    save_adapter(Path("other"), Path("wide"), [3, 4], 0)
    here.experiment["adapters"]["B"] = "other"
    assert "down_proj is (64, 112) in the model and (64, 96) in the adapter" in fault(here)
    here.config["models"]["dense"] = HUB
    assert checked(here).faults == []
    here.experiment["adapters"]["C"] = "other"  # which layers it has is known all the same
    assert "matches nothing" in fault(here)


def test_adapters_of_parts_without_layers_or_merges_are_not_asked_for(here):
    here.experiment["layers"] = {"B": [3, 4, 5, 6], "C": []}
    here.experiment["adapters"]["C"] = "nowhere"
    assert checked(here).faults == []
    here.experiment["perplexity"]["variants"] = ["dense", "pruned"]
    here.experiment["adapters"] = {part: "nowhere" for part in "ABC"}
    assert checked(here).faults == []


def test_a_given_pruned_model_is_taken_and_its_parts_are_what_adapters_are_held_against(here):
    give_pruned(here)
    assert checked(here).faults == []
    here.config["models"]["dense"] = HUB
    change_json("adapters/B/adapter_config.json", target_modules=["q_proj"])
    assert "does not target" in fault(here)


def identify(*files):
    for digit, file in enumerate(files):
        change_json(file, pruning_identity=f"{digit}" * 64)


def reshape(file):
    tensors = load_file(file)
    save_file({name: tensor[:4].contiguous() for name, tensor in tensors.items()}, file)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda a, b: shutil.rmtree(b["C"]), "pruned.bundles: there is no old/bundles/C; of this path, "),
        (lambda a, b: (b["B"] / "layer_003.safetensors").unlink(), "pruned.bundles: layer_003.safetensors missing"),
        (lambda a, b: reshape(b["B"] / "layer_003.safetensors"), "pruned.bundles: model.layers.3."),
        (lambda a, b: [f.unlink() for f in b["B"].iterdir()], "holds no bundle_meta.json and no layer_XXX"),
        (lambda a, b: (a / "model.safetensors").unlink(), "pruned.A: there is no model.safetensors"),
        (lambda a, b: (a / "config.json").unlink(), "pruned.A: old/A holds no config.json"),
        (lambda a, b: identify(a / "manifest.json", b["C"] / "bundle_meta.json"), "is of the pruning 1111"),
    ],
)  # fmt: skip
def test_a_given_part_that_is_not_whole(here, spoil, told):
    spoil(*give_pruned(here))
    assert fault(here).startswith("experiments.tiny.pruned") and told in fault(here)


def test_a_pruned_model_of_another_dense_model(here):
    give_pruned(here)
    shutil.rmtree("dense")
    torch.manual_seed(0)
    MistralForCausalLM(tiny_config(vocab_size=259, hidden_size=48)).save_pretrained("dense")
    shutil.copy("adapters/A/adapter_config.json", "dense/tokenizer.json")  # some tokenizer
    told = "".join(checked(here).faults)
    assert "experiments.tiny.pruned.A: lm_head.weight has the shape (259, 64)" in told
    assert "and in " in told and "it is (259, 48)" in told


def test_a_missing_a_is_told_with_the_path_that_is_there(here):
    give_pruned(here)
    here.experiment["pruned"]["A"] = "old/AA"
    with pytest.raises(ConfigError, match=r"experiments\.tiny\.pruned\.A: there is no old/AA; of this path, .*old is"):
        check_config(here.config, SCHEMA)


def test_bundles_that_nothing_goes_through_may_be_missing(here):
    _, bundles = give_pruned(here)
    shutil.rmtree(bundles["C"])
    here.experiment["perplexity"] |= {"variants": ["pruned"], "stages": ["A", "AB"]}
    assert checked(here).faults == []


BIG = 1 << 21  # more than is read whole


@pytest.mark.parametrize(
    ("name", "content", "column", "told"),
    [
        ("a.txt", b"", "text", "the text is empty"),
        ("a.txt", b" \n ", "text", "the text is empty"),
        ("a.txt", "é".encode("latin-1"), "text", "is not UTF-8"),
        ("a.docx", b"x", "text", "is of no format that is read here"),
        ("a.csv", b"title,body\n" + b"x,y\n" * BIG, "text", "no column 'text', only 'title', 'body'"),
        ("a.jsonl", b'{"body": "x"}\n' * (BIG // 8), "text", "no column 'text', only 'body'"),
        ("a.jsonl.gz", gzip.compress(b'{"body": "x"}\n'), "text", "no column 'text', only 'body'"),
        ("a.jsonl.gz", b"no gzip", "text", "cannot be read"),
        ("a.docx", b"x" * BIG, "text", "is of no format that is read here"),
        ("a.csv", b"title,body\nx,y\n", "body", None),
        ("a.csv", b"\xef\xbb\xbftitle,body\n" + b"x,y\n" * BIG, "title", None),
        ("a.jsonl", b'{"body": "xx"}\n' * (BIG // 8), "body", None),
        ("a.json", b'[{"body": "' + b"x" * BIG + b'"}]', "text", None),  # would have to be read whole
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_texts_of_the_user_s_own(here, name, content, column, told):
    Path(name).write_bytes(content)
    here.config["datasets"]["corpus"] = {"dataset": name, "column": column}
    if told is None:
        assert checked(here).faults == []
    else:
        assert fault(here).startswith("datasets.corpus: ") and told in fault(here)


def test_columns_of_parquet_and_of_mirrors(here):
    pd.DataFrame({"body": ["x" * BIG], "n": [1]}).to_parquet("a.parquet", compression=None)
    here.config["datasets"]["corpus"] = {"dataset": "a.parquet"}
    assert "no column 'text', only 'body', 'n'" in fault(here)
    Path("mirror").mkdir()
    here.config["datasets"]["corpus"] = {"dataset": "wikitext2", "mirror": "mirror"}
    assert "is no copy of Salesforce/wikitext" in fault(here)
    shutil.copy("a.parquet", "mirror/test-00000-of-00001.parquet")
    assert "no column 'text', only 'body', 'n'" in fault(here)
    Path("mirror/test-00000-of-00001.parquet").write_bytes(b"x" * BIG)
    assert "is not a parquet file" in fault(here)


def test_columns_and_splits_of_saved_datasets(here):
    import datasets

    rows = datasets.Dataset.from_dict({"body": ["a text"]})
    datasets.DatasetDict({"train": rows}).save_to_disk("saved")
    here.config["datasets"]["corpus"] = {"dataset": "saved", "column": "body"}
    assert "there is no test split, only train" in fault(here)
    here.config["datasets"]["corpus"] |= {"split": "train"}
    assert checked(here).faults == []
    here.config["datasets"]["corpus"] |= {"column": "text"}
    assert "no column 'text', only body" in fault(here)


def test_a_split_that_is_none_and_a_mirror_of_nothing(here):
    here.config["datasets"]["corpus"] = {"dataset": "pydoc", "split": "tset"}
    assert fault(here) == "datasets.corpus.split: 'tset' is not one of train, validation, test"
    here.config["datasets"]["corpus"] = {"dataset": "pydoc", "mirror": "dense"}
    assert "no benchmark is asked for" in fault(here)


def test_doubts_about_lengths_are_warnings(here):
    here.experiment["perplexity"]["seqlen"] = 100_000
    size = Path("corpus.txt").stat().st_size
    assert checked(here).faults == []
    assert checked(here).warnings == [
        "experiments.tiny.perplexity.seqlen: 100000 tokens are more than the 256 positions that dense was made for",
        f"experiments.tiny.perplexity.seqlen: the text corpus has {size} bytes, which hardly make one window of 100000"
        " tokens",
    ]


def test_positions_of_a_fetched_model_are_known_too(here):
    here.config["models"]["dense"] = HUB
    here.experiment["importance"] = {"dataset": "corpus", "seqlen": 300}
    assert checked(here).warnings == []
    Path("resources/models").mkdir(parents=True)
    shutil.move("dense", "resources/models/dense")
    assert [line.split(":")[0] for line in checked(here).warnings] == ["experiments.tiny.importance.seqlen"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"dataset": "pydoc"}, {"dataset": "pydoc", "split": "test"}, True),
        ({"dataset": "pydoc"}, {"dataset": "pydoc", "split": "train"}, False),
        ({"dataset": "c4"}, {"dataset": "c4", "split": "validation"}, True),
        ({"dataset": "corpus.txt"}, {"dataset": "corpus.txt", "split": "train"}, True),
        ({"text_files": ["corpus.txt"]}, {"text_files": ["corpus.txt"], "split": "train"}, True),
    ],
)
def test_training_on_the_text_of_the_evaluation_is_doubted(here, one, other, same):
    here.config["datasets"] = {"corpus": one, "train": other}
    here.experiment["distill"] = {"dataset": "train", "seqlen": 32}
    assert checked(here).warnings == []  # nothing is trained
    here.experiment["adapters"]["C"] = "train"
    warnings = checked(here).warnings
    assert len(warnings) == same
    if same:
        assert "experiments.tiny.perplexity.datasets: corpus is the text of distill.dataset, train" in warnings[0]
