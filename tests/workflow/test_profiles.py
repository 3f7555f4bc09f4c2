"""What jobs ask of a machine or a cluster, from dry runs: by the geometry of their model, whatever a profile says."""

import json
import re

import pytest
import yaml
from workflow_project import ROOT

from mistral_prune_lora.gpus import has_gpus
from mistral_prune_lora.workflow import needs
from mistral_prune_lora.workflow.configuration import check_config
from mistral_prune_lora.workflow.content import Content
from mistral_prune_lora.workflow.plan import Plan

COMMON = {"model_type": "mistral", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "head_dim": 128}
SIZES = {
    "m135": {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "head_dim": 64},
    "m7b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 32000},
    "m70b": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
             "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip


@pytest.fixture
def three_sizes(project, monkeypatch):
    """Three fetched models, of which config.json is enough here; and the 7B one under two layouts."""
    monkeypatch.chdir(project.folder)
    experiments, models = {}, {}
    for name, sizes in SIZES.items():
        folder = project.folder / "resources/models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(COMMON | sizes))
        (folder / "source.json").write_text("{}")
        models[name] = {"num_layers": sizes["num_hidden_layers"], "hub": {"repo_id": f"a/{name}", "revision": "0" * 40}}
        distill = {"dataset": "corpus", "seqlen": 512, "windows": 8}
        experiments[name] = {
            "model": name,
            "layers": {"B": [3, 4], "C": [5, 6]},
            "distill": distill,
            "perplexity": {"datasets": ["corpus"], "seqlen": 512, "windows": 8},
        }
    experiments["second"] = {**experiments["m7b"], "layers": {"B": [10, 11, 12, 13], "C": [14]}}
    project.config |= {"models": models, "experiments": experiments}
    return project


def asked(printed: str) -> dict[str, dict[str, str]]:
    """What each job asks for, by its rule and name."""
    found = {}
    for block in re.split(r"\n(?=(?:local)?(?:rule|checkpoint) )", printed):
        rule = re.match(r"(?:local)?(?:rule|checkpoint) (\w+):", block)
        made = re.search(r"wildcards: made=([\w-]+)", block)
        line = re.search(r"\n\s+resources: (.*)", block)
        if rule and made and line:
            found[made[1]] = dict(part.split("=", 1) for part in line[1].split(", ") if "=" in part)
    return found


def plan_of(project) -> Plan:
    config = check_config(yaml.safe_load(yaml.safe_dump(project.config)), ROOT / "rules/config.schema.yaml")
    return Plan.of(config, Content(project.folder / "digests.json"))


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_every_job_asks_for_what_its_model_needs(three_sizes, profile):
    told = asked(three_sizes.snakemake("--dry-run", "--workflow-profile", str(ROOT / "profiles" / profile)))
    plan = plan_of(three_sizes)
    wanted = {
        **{name: needs.of_training(training) for name, training in plan.trainings.items()},
        **{name: needs.of_merge(merge) for name, merge in plan.merges.items()},
        **{name: needs.of_segment(run) for name, run in plan.segments.items()},
        **{name: needs.of_score(run) for name, run in plan.scores.items()},
        **{name: needs.of_pruning(pruning) for name, pruning in plan.prunings.items()},
    }
    there = profile == "slurm" or has_gpus()  # one machine without a GPU has none to share out
    for name, need in wanted.items():
        assert {key: int(told[name][key]) for key in ("mem_mb", "runtime", "gpu")} == {
            "mem_mb": need.mem_mb, "runtime": need.runtime, "gpu": need.gpu * there,
        }, name  # fmt: skip
    # Of the same steps, a larger model's ask for more; and training on a GPU for one.
    experiments = plan.experiments
    memory = [int(told[experiments[size].training("A").name]["mem_mb"]) for size in SIZES]
    assert memory == sorted(memory) and memory[2] > 5 * memory[1] > 5 * memory[0]
    assert told[experiments["second"].training("B").name]["gpu"] == str(int(there))


def test_jobs_take_the_threads_of_the_configuration_and_no_more_than_there_are(three_sizes):
    def threads() -> set[str]:
        return set(re.findall(r"\n\s+threads: (\d+)", three_sizes.snakemake("--dry-run", "--cores", "3")))

    assert threads() == {"3"}
    three_sizes.config["threads"] = 2
    assert threads() == {"2"}
    three_sizes.config["threads"] = 8
    assert threads() == {"3"}
    three_sizes.config["threads"] = 1
    assert threads() == set(), "one is not worth a line"


def test_one_overridden_number_leaves_all_others(three_sizes):
    before = asked(three_sizes.snakemake("--dry-run"))
    after = asked(three_sizes.snakemake("--dry-run", "--set-resources", "train_adapter:mem_mb=123456"))
    trained = plan_of(three_sizes).trainings
    assert {after[name]["mem_mb"] for name in trained} == {"123456"}
    for name, resources in before.items():
        kept = {key: value for key, value in resources.items() if not key.startswith("mem") or name not in trained}
        assert kept.items() <= after[name].items(), name


def test_profiles_hold_what_a_site_has_and_no_rules():
    for profile in ("default", "slurm"):
        settings = yaml.safe_load((ROOT / "profiles" / profile / "config.yaml").read_text())
        assert not {"set-resources", "set-threads"} & set(settings)
