import copy
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from mistral_prune_lora.distillation.settings import KD_LOSSES, LOGGERS, Running, TrainingSettings
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.text.dataset_spec import DatasetSpec
from mistral_prune_lora.workflow.configuration import (
    ConfigError,
    check_config,
    experiment_layout,
    trained_parts,
    with_yaml_values,
)

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "rules" / "config.schema.yaml"


@pytest.fixture
def example():
    return yaml.safe_load((ROOT / "config.yaml").read_text())


def mistakes(config):
    with pytest.raises(ConfigError) as caught:
        check_config(config, SCHEMA)
    return str(caught.value)


def test_the_example_names_every_key_that_has_a_default(example):
    """A reader of config.yaml sees every switch there is: filling in defaults adds nothing to the experiment."""
    before = copy.deepcopy(example)
    check_config(example, SCHEMA)
    # Shown as comments, beside the datasets that they make sense for; and finer points of the optimiser.
    left_out = {"mirror", "column", "weight_decay", "max_grad_norm", "adapt_layers"}
    left_out |= {"revision", "config", "streaming", "shape", "documents", "preset", "template", "columns"}
    left_out |= {"packing", "padding_side"}

    def compare(old, new, path):
        for key in set(new) - left_out:
            assert key in old, f"{path}.{key}"
            if isinstance(new[key], dict):
                compare(old[key], new[key], f"{path}.{key}")

    compare(before, example, "config")


def test_the_recipe_of_the_original_scripts_is_a_configuration():
    config = check_config(yaml.safe_load((ROOT / "configs/squad-recipe.yaml").read_text()), SCHEMA)
    distill = config["experiments"]["squad-recipe"]["distill"]
    parts = distill["parts"]
    assert [parts[part]["learning_rate"] for part in "ABC"] == [3e-4, 3e-5, 3e-5]
    for part in parts.values():
        assert part["steps"] * part["batch_size"] * part["gradient_accumulation"] == distill["windows"] == 20000
    assert list(DatasetSpec.of(config["datasets"]["squad"]).faults()) == []


def test_every_mistake_is_reported_at_once_with_its_path(example):
    experiment = example["experiments"]["smollm2"]
    experiment["perplexitty"] = {}
    experiment["distill"]["lora"]["rnk"] = 4
    experiment["perplexity"]["seqlen"] = "long"
    experiment["perplexity"]["variants"] = ["sparse"]
    example["models"]["smollm2-135m"]["path"] = "/somewhere"
    text = mistakes(example)
    assert "experiments.smollm2.perplexitty: unknown key" in text
    assert "experiments.smollm2.distill.lora.rnk: unknown key; known here: alpha," in text
    assert "experiments.smollm2.perplexity.seqlen: 'long' is not of type 'integer'" in text
    assert "experiments.smollm2.perplexity.variants.0: 'sparse' is not one of" in text
    assert "models.smollm2-135m: needs exactly one of path, hub and pypi" in text
    assert "5 mistakes" in text


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1.0e+400"])
def test_numbers_that_are_none_are_mistakes_with_their_paths(example, value):
    """YAML has words for them, and NaN is below no bound."""
    number, distill = yaml.safe_load(value), example["experiments"]["smollm2"]["distill"]
    distill["lora"] |= {"alpha": number, "dropout": number}
    distill["loss"] |= {"kd_alpha": number, "temperature": number}
    distill["parts"]["A"] |= {name: number for name in ("learning_rate", "weight_decay", "max_grad_norm", "steps")}
    example["experiments"]["smollm2"]["perplexity"]["windows"] = number
    text = mistakes(example)
    for path in (
        "lora.alpha", "lora.dropout", "loss.kd_alpha", "loss.temperature", "parts.A.learning_rate",
        "parts.A.weight_decay", "parts.A.max_grad_norm",
    ):  # fmt: skip
        assert f"experiments.smollm2.distill.{path}: {number} is not of type 'number'" in text
    assert f"distill.parts.A.steps: {number} is not of type 'integer'" in text
    assert f"perplexity.windows: {number} is not of type 'integer', 'null'" in text


def test_numbers_that_training_would_break_on_are_mistakes(example):
    distill = example["experiments"]["smollm2"]["distill"]
    distill["parts"]["A"] |= {"learning_rate": 1e30, "steps": 100.0}
    distill["loss"]["temperature"] = 0
    text = mistakes(example)
    assert "distill.parts.A.learning_rate: 1e+30 is greater than the maximum of 1" in text
    assert "distill.parts.A.steps: 100.0 is not of type 'integer'" in text
    assert "distill.loss.temperature: 0 is less than or equal to the minimum of 0" in text


def test_every_mistake_is_one_printable_line(example):
    example["experiments"]["smollm2"] |= {"a\nb\x1b[31m": 1, "k" * 2000: 2}
    lines = mistakes(example).splitlines()
    assert lines[0] == "the configuration has 2 mistakes:" and len(lines) == 3
    assert any(r"experiments.smollm2.a\nb\x1b[31m: unknown key" in line for line in lines)
    assert all(line.isprintable() and len(line) <= 502 for line in lines)


def test_references_and_layers_are_checked_together(example):
    experiment = example["experiments"]["smollm2"]
    experiment["perplexity"]["datasets"] = ["pydoc", "wikitext3"]
    experiment["layers"]["C"] = [15, 30]
    text = mistakes(example)
    assert "perplexity.datasets: 'wikitext3' is not one of datasets: pydoc, pydoc-train" in text
    assert "layers: layers [30] do not exist in a model of 30 layers" in text


def test_an_empty_or_listed_configuration_is_an_error_not_a_traceback():
    assert "'models' is a required property" in mistakes({})
    assert "is not of type 'object'" in mistakes({"models": [], "datasets": {}, "experiments": {}})


def test_defaults_are_not_shared_between_experiments(example):
    second = {"model": "smollm2-135m", "layers": {"B": [1], "C": []}, "perplexity": {"datasets": ["pydoc"]}}
    second["adapters"] = {part: "given" for part in "ABC"}
    example["experiments"] |= {"second": second, "third": copy.deepcopy(second)}
    config = check_config(example, SCHEMA)
    config["experiments"]["second"]["distill"]["lora"]["rank"] = 99
    assert config["experiments"]["third"]["distill"]["lora"]["rank"] == 16
    assert experiment_layout(config, "second") == Layout(30, (1,), ())
    assert trained_parts(config["experiments"]["second"], experiment_layout(config, "second")) == []


def test_training_without_a_text_is_refused(example):
    del example["experiments"]["smollm2"]["distill"]
    assert "distill.dataset: needed to train the adapters A, B" in mistakes(example)


def test_closed_forms_that_cannot_be_are_refused(example):
    experiment = example["experiments"]["smollm2"]
    experiment["adapters"]["A"] = "closed-form"
    experiment["closed_form"] = {"datasets": {"nowhere": 1}, "held_out": 0}
    experiment["distill"]["start"] = "closed-form"
    experiment["distill"]["lora"]["use_dora"] = True
    experiment["distill"]["parts"]["B"]["adapt_layers"] = [12]
    told = mistakes(example)
    for expected in (
        "closed_form.datasets: 'nowhere' is not one of datasets",
        "closed_form.held_out: needed to choose the ridge on",
        "distill.start: with DoRA",
        "distill.parts.B.adapt_layers: leaves out layers [15], which distill.start changes",
    ):
        assert expected in told, expected


def test_a_given_pruned_model_tells_its_own_layers(example, tmp_path):
    experiment = example["experiments"]["smollm2"]
    del experiment["layers"]
    experiment["distill"]["parts"]["A"]["adapt_layers"] = "all"
    experiment["pruned"] = {"A": str(tmp_path), "bundles": str(tmp_path)}
    assert f"experiments.smollm2.pruned: there is no manifest.json (in {tmp_path})" in mistakes(example)
    (tmp_path / "manifest.json").write_text(
        '{"counts": {"L_full": 30}, "stages": {"A": {"dropped_layers": [3, 4]}, "B": {"removed_layers": [3]},'
        ' "C": {"removed_layers": [4]}}}'
    )
    assert experiment_layout(check_config(example, SCHEMA), "smollm2") == Layout(30, (3,), (4,))
    example["models"]["smollm2-135m"]["num_layers"] = 31
    assert "the manifest speaks of 30 layers, the model has 31" in mistakes(example)


def test_the_schema_s_defaults_of_training_are_the_library_s():
    defaults = yaml.safe_load(SCHEMA.read_text())["$defs"]
    own, properties = TrainingSettings(), defaults["distill"]["properties"]
    for name, schema in (
        ("lora", properties["lora"]),
        ("loss", properties["loss"]),
        ("optimiser", defaults["optimiser"]),
    ):
        found = {key: entry["default"] for key, entry in schema["properties"].items() if key != "adapt_layers"}
        wanted = asdict(getattr(own, name))
        assert found == {key: list(value) if isinstance(value, tuple) else value for key, value in wanted.items()}
    looks = properties["held_out"]["properties"]
    for name, value in asdict(own.held_out).items():
        assert looks[name]["default"] == value
    for name in ("seed", "skip_spikes", "teacher_4bit"):
        assert properties[name]["default"] == getattr(own, name)
    assert properties["save_steps"]["default"] == Running().save_steps
    assert tuple(properties["loggers"]["items"]["enum"]) == LOGGERS
    assert tuple(properties["loss"]["properties"]["kd_loss"]["enum"]) == KD_LOSSES
    assert properties["gradient_checkpointing"]["default"] == own.gradient_checkpointing


def test_values_from_the_command_line_are_what_yaml_makes_of_them():
    config = {"keep_activations": "false", "models": {}, "baseline": "no"}
    assert with_yaml_values(config, {"keep_activations": "false", "baseline": "yes", "other": "1"}) == {
        "keep_activations": False, "models": {}, "baseline": "no",
    }  # fmt: skip
