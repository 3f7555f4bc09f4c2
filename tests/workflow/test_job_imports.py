"""What the process of a job imports before its work: what it needs, and nothing else."""

import ast
import json
import subprocess
import sys

import pytest
from script_imports import SCRIPTS, imports_of

MODELS = {"transformers.modeling_utils", "torch.distributed.tensor", "torch._dynamo"}  # with them, three seconds
OTHERS = {"datasets", "matplotlib", "pandas", "peft", "pyarrow", "scipy", "torch", "transformers"}
BESIDE_MODELS = OTHERS - {"torch", "transformers"}
# What each script may import of these that makes no model.
NEEDED = {
    "beside": {"pandas", "pyarrow"},
    "check": set(),
    "export_stage": {"torch", "transformers"},
    "fetch_model": {"torch", "transformers"},
    "merge": {"torch"},
    "plot_importance": {"matplotlib", "pandas", "pyarrow"},
    "plot_perplexity": {"matplotlib", "pandas", "pyarrow"},
    "plot_training": {"matplotlib", "pandas", "pyarrow"},
    "prune": {"torch"},
    "report_pages": {"pandas", "pyarrow"},
    "show": {"pandas", "pyarrow"},
    "strength": {"torch"},
    "summary": {"pandas", "pyarrow"},
    "tidy": set(),
    "windows": {"torch"},
}
# What those that run a model may import beside torch, transformers and its model's classes.
NEEDED_BESIDE_MODELS: dict[str, set[str]] = {
    "choose": set(),
    "closed_form": set(),
    "importance": set(),
    "perplexity": set(),
    "prefix_states": set(),
    "segment": set(),
    "teacher_states": set(),
    "train_adapter": {"peft"},
}
TELL = "\nimport gc, json, sys\nprint(json.dumps([sorted(sys.modules), gc.get_freeze_count(), gc.isenabled()]))\n"


def imported(code):
    """The modules that a process has after that, how many objects its collector leaves out, and whether it collects."""
    run = subprocess.run([sys.executable, "-c", code + TELL], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_what_makes_no_model_imports_no_model_classes(name):
    modules, _, _ = imported(imports_of(SCRIPTS / f"{name}.py"))
    assert not MODELS & set(modules)
    assert OTHERS & set(modules) <= NEEDED[name]


@pytest.mark.parametrize("name", sorted(NEEDED_BESIDE_MODELS))
def test_what_runs_a_model_imports_tables_plots_and_training_where_it_needs_them(name):
    modules, left_out, collects = imported(imports_of(SCRIPTS / f"{name}.py"))
    assert BESIDE_MODELS & set(modules) <= NEEDED_BESIDE_MODELS[name]
    assert left_out > 100_000 and collects


def test_what_every_script_imports_is_bounded():
    assert NEEDED.keys() | NEEDED_BESIDE_MODELS.keys() == {script.stem for script in SCRIPTS.glob("*.py")}


@pytest.mark.parametrize("name", ["segment", "perplexity", "teacher_states", "prefix_states"])
def test_what_gathers_shards_imports_no_model_classes(name):
    modules, _, _ = imported(imports_of(SCRIPTS / f"{name}.py", ("a shard",)))
    assert not (MODELS | BESIDE_MODELS) & set(modules)


def test_what_puts_links_imports_nothing_large():
    modules, _, _ = imported("import mistral_prune_lora.workflow.place")
    assert not (OTHERS | {"numpy", "regex", "snakemake", "tqdm", "yaml"}) & set(modules)


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda script: script.stem)
def test_every_script_that_imports_something_large_does_it_quickly(script):
    quick = [node for node in ast.parse(script.read_text()).body if "quick_imports()" in ast.unparse(node)]
    assert len(quick) == (0 if NEEDED.get(script.stem, OTHERS) == set() else 1)
